//! A real vCPU touches memory whose userspace address has no mapping; `locate` and the exits must name it, and once the
//! page is there the guest must end as if it always had been.

#![cfg(target_arch = "x86_64")]

mod code;
mod guest;

use std::process::ExitCode;

use gmem_host::vcpu::{Access, AccessKind};
use guest::{Guest, Mode, Outcome};

/// A page that most cases forbid, the one behind it, and an ordinary one for data.
const F: u64 = 0x4_0000;
const G: u64 = F + 0x1000;
const DATA: u64 = 0x3_0000;
/// The device pages, and where the guest sees them.
const D: u64 = guest::DEVICE;
const L: u64 = guest::DEVICE_LINEAR;

/// One guest program and the accesses that must be reported, in order. Each names a page that has no mapping until then.
struct Case {
    name: &'static str,
    mode: Mode,
    code: &'static [u8],
    /// Where the program lies; 0 for the ordinary place.
    at: u64,
    regs: Vec<(guest::Reg, u64)>,
    expect: Vec<Access>,
    /// The processor's own accesses to its tables, which an emulating host makes in ways of its own.
    tables: bool,
}

const fn load(gpa: u64, size: u32) -> Access {
    Access { gpa, size, kind: AccessKind::Load }
}

const fn store(gpa: u64, size: u32) -> Access {
    Access { gpa, size, kind: AccessKind::Store }
}

const fn fetch(gpa: u64) -> Access {
    Access { gpa, size: 1, kind: AccessKind::Fetch }
}

macro_rules! case {
    ($mode:ident $name:ident [$($reg:ident = $value:expr),*] => $($access:expr),+) => {
        Case {
            name: stringify!($name),
            mode: Mode::$mode,
            code: code::$name(),
            at: 0,
            regs: vec![$((guest::Reg::$reg, $value)),*],
            expect: vec![$($access),+],
            tables: false,
        }
    };
}

fn tables(case: Case) -> Case {
    Case { tables: true, ..case }
}

fn cases() -> Vec<Case> {
    vec![
        case!(Long load_rsi [Rsi = F + 8] => load(F + 8, 8)),
        case!(Long store_byte [Rdi = F + 0xfff] => store(F + 0xfff, 1)),
        case!(Long store_rdi [Rdi = F - 4] => store(F, 4)),
        case!(Long store_rdi [Rdi = F + 0xffc] => store(F + 0xffc, 4)),
        case!(Long store_rdi [Rdi = F + 0xffc] => store(F + 0xffc, 4), store(G, 4)),
        case!(Long movsb [Rsi = F, Rdi = G] => load(F, 1), store(G, 1)),
        case!(Long rep_movsb [Rsi = DATA, Rdi = F - 0x10, Rcx = 0x20] => store(F, 1)),
        case!(Long rep_movsb [Rsi = F - 0x10, Rdi = DATA, Rcx = 0x20] => load(F, 1)),
        case!(Long rep_movsb [Rsi = F - 8, Rdi = G, Rcx = 0x20] => store(G, 1), load(F, 1)),
        case!(Long rep_stosq [Rdi = F - 24, Rcx = 8] => store(F, 8)),
        case!(Long rep_stosq [Rdi = F - 20, Rcx = 8] => store(F, 4)),
        case!(Long repne_cmpsb [Rsi = F - 8, Rdi = G, Rcx = 32] => load(G, 1), load(F, 1)),
        case!(Long push [Rsp = F + 0x1000] => store(F + 0xff8, 8)),
        case!(Long push_memory [Rsp = F + 0x1000, Rsi = G] => load(G, 8), store(F + 0xff8, 8)),
        case!(Long pop_memory [Rsp = F + 8, Rdi = G] => load(F + 8, 8), store(G, 8)),
        case!(Long call [Rsp = F + 8] => store(F, 8)),
        case!(Long enter_leave [Rsp = F + 0x28, Rbp = G] => store(F + 0x20, 8)),
        case!(Long add_memory [Rdi = F + 16] => store(F + 16, 8)),
        case!(Long xchg [Rdi = F + 16] => store(F + 16, 8)),
        case!(Long bts [Rdi = F - 8, Rax = 64 + 3] => store(F, 8)),
        case!(Long bts [Rdi = G, Rax = 0u64.wrapping_sub(1)] => store(G - 8, 8)),
        case!(Long cmpxchg16b [Rdi = F + 32] => store(F + 32, 16)),
        case!(Long movups_load [Rsi = F - 8] => load(F, 8)),
        case!(Long movups_store [Rdi = F - 8] => store(F, 8)),
        case!(Long vmovups_store [Rdi = F - 16] => store(F, 16)),
        case!(Long vgather [Rsi = F - 8] => load(F, 4)),
        case!(Long vmaskmov [Rdi = F - 8] => store(F, 4)),
        case!(Long fxsave [Rdi = F - 64] => store(F, 448)),
        case!(Long xsave [Rdi = F - 64 * 9] => store(F, 256)),
        case!(Long jump [Rsi = G] => fetch(G)),
        Case { at: F - 2, ..case!(Long crossing [] => fetch(F)) },
        // Linear 0x200000 is mapped by a page table in F: entry 0 to DATA, entry 1 to G.
        tables(case!(Long load_rsi [Rsi = 0x20_1010] => load(G + 0x10, 8))),
        tables(case!(Long load_rsi [Rsi = 0x20_1010] => load(F + 8, 8), load(G + 0x10, 8))),
        tables(case!(Long store_rdi [Rdi = 0x20_0ffc] => load(F, 8), store(G, 4))),
        tables(case!(Long divide [Rsi = 0] => load(guest::IDT, 8))),
        tables(case!(Long divide [Rsi = 0] => load(guest::GDT + 8, 8))),
        tables(case!(Long divide [Rsp = F + 0x40] => store(F + 0x38, 8))),
        tables(case!(Long int_ist [Rsi = 0] => load(guest::TSS + 0x24, 8))),
        tables(case!(Long int_ist [Rsi = 0] => store(guest::IST + 0xff8, 8))),
        tables(case!(Long page_fault [Rsp = F + 0x40] => store(F + 0x38, 8))),
        tables(case!(Long load_ds [Rax = 0x10] => load(guest::GDT + 0x10, 8))),
        tables(case!(Long iretq [Rsp = F + 0x18] => load(F + 0x18, 8))),
        // Pages without a memslot: KVM emulates and exits with MMIO, on every host.
        case!(Long load_rsi [Rsi = L + 8] => load(D + 8, 8)),
        case!(Long load_rsi [Rsi = L + 0xffc] => load(D + 0xffc, 4), load(D + 0x1000, 4)),
        case!(Long store_rdi [Rdi = L + 0xffc] => store(D + 0xffc, 4)),
        case!(Long store_rdi [Rdi = L + 0xffc] => store(D + 0xffc, 4), store(D + 0x1000, 4)),
        case!(Long movsb [Rsi = L, Rdi = L + 0x1000] => load(D, 1), store(D + 0x1000, 1)),
        case!(Long movsb [Rsi = L + 0x1000, Rdi = F] => load(D + 0x1000, 1), store(F, 1)),
        case!(Long rep_movsb [Rsi = L + 0xff0, Rdi = DATA, Rcx = 0x20] => load(D + 0xff0, 1), load(D + 0x1000, 1)),
        case!(Long rep_movsb [Rsi = DATA, Rdi = L + 0xff0, Rcx = 0x20] => store(D + 0xff0, 1), store(D + 0x1000, 1)),
        case!(Long rep_stosq [Rdi = L + 0xfec, Rcx = 8] => store(D + 0xfec, 8), store(D + 0x1000, 4)),
        case!(Long push [Rsp = L + 0x1000] => store(D + 0xff8, 8)),
        case!(Long push_memory [Rsp = L + 0x1000, Rsi = L + 0x1000] => load(D + 0x1000, 8), store(D + 0xff8, 8)),
        case!(Long pop_memory [Rsp = L + 8, Rdi = L + 0x1000] => load(D + 8, 8), store(D + 0x1000, 8)),
        case!(Long call [Rsp = L + 8] => store(D, 8)),
        case!(Long add_memory [Rdi = L + 16] => store(D + 16, 8)),
        case!(Long xchg [Rdi = L + 16] => store(D + 16, 8)),
        case!(Long bts [Rdi = L + 0x1000, Rax = 0u64.wrapping_sub(1)] => store(D + 0xff8, 8)),
        case!(Long cmpxchg16b [Rdi = L + 32] => store(D + 32, 16)),
        case!(Long movups_load [Rsi = L + 0xff8] => load(D + 0xff8, 8), load(D + 0x1000, 8)),
        case!(Long movups_store [Rdi = L + 0xff8] => store(D + 0xff8, 8), store(D + 0x1000, 8)),
        // Completed with zeros, this one raises an exception that must not survive.
        case!(Long divide_by_memory [Rsi = L + 0x1000] => load(D + 0x1000, 4)),
        case!(Long jump [Rsi = L] => fetch(D)),
        case!(Real real_store [Rdi = 0x10] => store(F + 0x10, 2)),
        case!(Real real_push [Rsp = 0x1000] => store(F + 0xffe, 2)),
        case!(Real real_rep_stos [Rdi = 0xff0, Rcx = 0x20] => store(G, 2)),
        tables(case!(Real real_int [Rsp = 0x1000] => store(F + 0xffe, 2))),
        tables(case!(Real real_int [Rsp = 0] => load(0x40 * 4, 4))),
    ]
}

/// Runs every case; a host on which some cannot happen says which.
/// The name under which a test runner knows this program, which is one test.
const TEST: &str = "guest_programs";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        if !arguments.iter().any(|argument| argument == "--ignored") {
            println!("{TEST}: test");
        }
        return ExitCode::SUCCESS;
    }
    let mut guest = match Guest::new() {
        Ok(guest) => guest,
        Err(missing) => {
            println!("skipped: {missing}");
            return ExitCode::SUCCESS;
        }
    };
    gmem_host::vcpu::prepare();
    let filter = arguments.into_iter().find(|argument| !argument.starts_with('-') && argument != TEST);
    let mut failed = 0;
    for case in cases().iter().filter(|case| filter.as_deref().is_none_or(|filter| case.name.contains(filter))) {
        match check(&mut guest, case) {
            Ok(how) => println!("ok      {:16} {:x?} ({how})", case.name, case.regs),
            Err(Failure::Skipped(why)) => println!("skipped {:16} {why}", case.name),
            Err(Failure::Wrong(why)) => {
                println!("FAILED  {:16} {:x?}: {why}", case.name, case.regs);
                failed += 1;
            }
        }
    }
    guest.report_cost();
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

enum Failure {
    Skipped(String),
    Wrong(String),
}

/// The program runs twice: with all its pages, and with those of `expect` missing until each is reported.
fn check(guest: &mut Guest, case: &Case) -> Result<&'static str, Failure> {
    let start = |guest: &mut Guest| guest.start(case.mode, case.code, case.at, &case.regs);
    start(guest);
    let plain = guest.run(&[]).map_err(|why| Failure::Skipped(format!("this host cannot run it: {why}")))?;
    start(guest);
    let pages: Vec<u64> = case.expect.iter().map(|access| access.gpa & !0xfff).collect();
    let end = guest.run(&pages).and_then(|faulted| {
        compare(case, &plain, &faulted)?;
        Ok(faulted.how)
    });
    end.map_err(|why| {
        if case.tables && guest.host == "MMIO" {
            Failure::Skipped(format!("this host emulates: {why}"))
        } else {
            Failure::Wrong(why)
        }
    })
}

fn compare(case: &Case, plain: &Outcome, faulted: &Outcome) -> Result<(), String> {
    // A host that emulates reports pieces of an access; what must agree is which pages, in which order.
    let exact = faulted.how == "EFAULT";
    let page = |access: &Access| access.gpa & !0xfff;
    let same = if exact {
        faulted.reported == case.expect
    } else {
        faulted.reported.iter().map(page).eq(case.expect.iter().map(page))
    };
    if !same {
        return Err(format!("reported {:x?} instead of {:x?}", faulted.reported, case.expect));
    }
    if plain.regs != faulted.regs {
        return Err(format!("registers {:x?} instead of {:x?}", faulted.regs, plain.regs));
    }
    if plain.memory == faulted.memory {
        return Ok(());
    }
    match plain.memory.iter().zip(&faulted.memory).position(|(plain, faulted)| plain != faulted) {
        Some(at) => Err(format!("memory differs at {at:#x}")),
        None => Ok(()),
    }
}
