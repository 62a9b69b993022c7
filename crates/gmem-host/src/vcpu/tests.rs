//! The walker, the decoder and event delivery on hand-built memory, without /dev/kvm.

use std::cell::RefCell;

use proptest::collection::vec;
use proptest::prelude::*;

use super::layout::{Events, Regs, Segment, Sregs};
use super::state::{Component, EFER_LMA};
use super::*;

const CODE: u64 = 0x1_0000;
const MEMORY: usize = 1 << 20;

/// A vCPU and its memory. What `locate_in` asks about is recorded.
struct Machine {
    cpu: Cpu,
    events: Events,
    xsave: Vec<u64>,
    memory: Vec<u8>,
    asked: RefCell<Vec<(u64, AccessKind)>>,
}

impl core::fmt::Debug for Machine {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let code = usize::try_from(CODE).unwrap();
        write!(f, "{:x?} {:x?} code {:02x?}", self.cpu, self.events, &self.memory[code..code + 16])
    }
}

impl GuestView for Machine {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> bool {
        let from = usize::try_from(gpa).unwrap_or(usize::MAX);
        match self.memory.get(from..from.saturating_add(buf.len())) {
            Some(bytes) => {
                buf.copy_from_slice(bytes);
                true
            }
            None => false,
        }
    }
}

impl Source for Machine {
    fn regs(&self) -> Result<Regs, Errno> {
        Ok(self.cpu.regs)
    }
    fn sregs(&self) -> Result<Sregs, Errno> {
        Ok(self.cpu.sregs)
    }
    fn events(&self) -> Result<Events, Errno> {
        Ok(self.events)
    }
    fn xcr0(&self) -> Result<u64, Errno> {
        Ok(7)
    }
    fn xsave(&self) -> Result<Vec<u64>, Errno> {
        Ok(self.xsave.clone())
    }
    fn component(&self, number: u32) -> Component {
        let (size, offset) = if number == 2 { (256, 576) } else { (64, 1088) };
        Component { size, offset, aligned: false }
    }
}

impl Machine {
    /// 16-bit code at [`CODE`], every segment but CS at 0, no paging.
    fn real(code: &[u8]) -> Self {
        let mut cpu = Cpu::default();
        cpu.sregs.cs.base = CODE;
        cpu.sregs.idt.limit = 0x3ff;
        let mut machine = Self {
            cpu,
            events: Events::default(),
            xsave: vec![0; 512],
            memory: vec![0; MEMORY],
            asked: RefCell::default(),
        };
        machine.poke(CODE, code);
        machine
    }

    /// Flat 32-bit code, no paging.
    fn flat32(code: &[u8]) -> Self {
        let mut machine = Self::real(code);
        let flat = Segment { db: 1, s: 1, present: 1, limit: u32::MAX, ..Default::default() };
        let sregs = &mut machine.cpu.sregs;
        (sregs.cs, sregs.ds, sregs.es, sregs.ss) = (flat, flat, flat, flat);
        sregs.cr0 = 1;
        machine.cpu.regs.rip = CODE;
        machine
    }

    /// 64-bit code under identity-mapping 4-level tables with 2 MiB pages at 0x2000, accessed and dirty.
    fn long(code: &[u8]) -> Self {
        let mut machine = Self::flat32(code);
        let sregs = &mut machine.cpu.sregs;
        (sregs.cs.l, sregs.cs.db) = (1, 0);
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0001, 0x2000, 0x20, 0x100 | EFER_LMA);
        machine.poke64(0x2000, 0x3000 | 0x23);
        machine.poke64(0x3000, 0x4000 | 0x23);
        machine.poke64(0x4000, 0xe3);
        machine
    }

    fn poke(&mut self, gpa: u64, bytes: &[u8]) {
        let at = usize::try_from(gpa).unwrap();
        self.memory[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn poke64(&mut self, gpa: u64, value: u64) {
        self.poke(gpa, &value.to_le_bytes());
    }

    /// The access that is found when `frames` are forbidden.
    fn locate(&self, frames: &[u64]) -> Option<Access> {
        self.asked.borrow_mut().clear();
        let forbidden = &mut |gfn: Gfn, kind| {
            self.asked.borrow_mut().push((gfn.0, kind));
            frames.contains(&gfn.0)
        };
        locate_in(self, self, forbidden).unwrap()
    }
}

fn access(kind: AccessKind, gpa: u64, size: u32) -> Option<Access> {
    Some(Access { gpa, size, kind })
}

use AccessKind::{Fetch, Load, Store};

#[test]
fn nothing_is_found_where_nothing_is_forbidden() {
    let machine = Machine::long(&[0x48, 0x8b, 0x06]); // mov rax, [rsi]
    assert_eq!(machine.locate(&[]), None);
    assert_eq!(machine.asked.borrow().last(), Some(&(0, Load)));
}

#[test]
fn a_table_page_comes_before_the_page_it_maps() {
    let mut machine = Machine::long(&[0x48, 0x8b, 0x06]);
    machine.cpu.regs.rsi = 0x5_0000;
    assert_eq!(machine.locate(&[2, 0x50]), access(Load, 0x2000, 8));
    assert_eq!(machine.locate(&[4, 0x50]), access(Load, 0x4000, 8));
    assert_eq!(machine.locate(&[0x50]), access(Load, 0x5_0000, 8));
}

#[test]
fn missing_accessed_and_dirty_bits_are_stores_to_the_table() {
    let mut machine = Machine::long(&[0x48, 0x89, 0x06]); // mov [rsi], rax
    machine.poke64(0x4000, 0x83 | 0x20);
    machine.locate(&[]);
    assert!(machine.asked.borrow().contains(&(4, Store)), "dirty");
    assert!(!machine.asked.borrow().contains(&(3, Store)));
    machine.poke64(0x3000, 0x4000 | 3);
    machine.locate(&[]);
    assert!(machine.asked.borrow().contains(&(3, Store)), "accessed");
}

#[test]
fn the_guests_own_fault_hides_what_comes_after() {
    let mut machine = Machine::long(&[0x48, 0xa5]); // movsq
    machine.cpu.regs.rdi = 0x5_0000;
    machine.cpu.regs.rsi = 0x4000_0000; // not present
    assert_eq!(machine.locate(&[0x50]), None);
    machine.cpu.regs.rsi = 1 << 47; // not canonical
    assert_eq!(machine.locate(&[0x50]), None);
    machine.cpu.regs.rsi = 0;
    assert_eq!(machine.locate(&[0x50]), access(Store, 0x5_0000, 8));
}

#[test]
fn permissions_end_a_walk() {
    let mut machine = Machine::long(&[0x48, 0x89, 0x06]); // mov [rsi], rax
    machine.cpu.regs.rsi = 0x5_0000;
    machine.poke64(0x4000, 0xe1);
    assert_eq!(machine.locate(&[0x50]), access(Store, 0x5_0000, 8), "CR0.WP is clear");
    machine.cpu.sregs.cr0 |= 1 << 16;
    assert_eq!(machine.locate(&[0x50]), None, "read-only");
    machine.poke64(0x4000, 0xe3);
    assert_eq!(machine.locate(&[0x50]), access(Store, 0x5_0000, 8));
    machine.cpu.sregs.ss.dpl = 3;
    assert_eq!(machine.locate(&[0x10]), None, "a supervisor page for user code");
}

#[test]
fn the_low_page_of_a_crossing_access_comes_first() {
    let mut machine = Machine::long(&[0x48, 0x89, 0x06]);
    machine.cpu.regs.rsi = 0x5_0ffd;
    assert_eq!(machine.locate(&[0x50, 0x51]), access(Store, 0x5_0ffd, 3));
    assert_eq!(machine.locate(&[0x51]), access(Store, 0x5_1000, 5));
}

#[test]
fn five_levels_pae_and_two_levels_translate_alike() {
    let mut five = Machine::long(&[0x8b, 0x06]); // mov eax, [rsi]
    five.cpu.sregs.cr4 |= 1 << 12;
    five.cpu.sregs.cr3 = 0x1000;
    five.poke64(0x1000, 0x2000 | 0x23);

    let mut pae = Machine::flat32(&[0x8b, 0x06]);
    pae.cpu.sregs.cr0 = 0x8000_0001;
    pae.cpu.sregs.cr4 = 0x20;
    pae.cpu.sregs.cr3 = 0x2020;
    pae.poke64(0x2020, 0x4000 | 1);
    pae.poke64(0x4000, 0xe3);

    let mut two = Machine::flat32(&[0x8b, 0x06]);
    two.cpu.sregs.cr0 = 0x8000_0001;
    two.cpu.sregs.cr3 = 0x2000;
    two.poke(0x2000, &(0x3000u32 | 0x23).to_le_bytes());
    for page in 0..256u32 {
        two.poke(0x3000 + 4 * u64::from(page), &(page << 12 | 0x63).to_le_bytes());
    }

    for machine in [&mut five, &mut pae, &mut two] {
        machine.cpu.regs.rsi = 0x5_0123;
        assert_eq!(machine.locate(&[0x50]), access(Load, 0x5_0123, 4));
    }
}

#[test]
fn large_pages_reach_their_high_addresses() {
    let mut machine = Machine::long(&[0x8b, 0x06]);
    machine.poke64(0x3008, (7 << 30) | 0xe3); // 1 GiB
    machine.cpu.regs.rsi = 0x4765_4321;
    assert_eq!(machine.locate(&[(7 << 18) + 0x7654]), access(Load, (7 << 30) + 0x765_4321, 4));

    let mut pse36 = Machine::flat32(&[0x8b, 0x06]);
    (pse36.cpu.sregs.cr0, pse36.cpu.sregs.cr3, pse36.cpu.sregs.cr4) = (0x8000_0001, 0x2000, 0x10);
    pse36.poke(0x2000, &0xe3u32.to_le_bytes());
    pse36.poke(0x2004, &(0x0080_0000u32 | 5 << 13 | 0xe3).to_le_bytes());
    pse36.cpu.regs.rsi = 0x0040_1000;
    assert_eq!(pse36.locate(&[0x0050_0801]), access(Load, 0x5_0080_1000, 4));
}

#[test]
fn a_fetch_stops_at_the_end_of_the_instruction() {
    let mut machine = Machine::long(&[]);
    machine.poke(0x1_0ffe, &[0xb8, 1, 0, 0, 0]); // mov eax, 1: two bytes in the first page
    machine.cpu.regs.rip = 0x1_0ffe;
    assert_eq!(machine.locate(&[0x11]), access(Fetch, 0x1_1000, 1));
    assert_eq!(machine.locate(&[0x10, 0x11]), access(Fetch, 0x1_0ffe, 1));
    machine.poke(0x1_0ffe, &[0x31, 0xc0]); // xor eax, eax: just fits
    assert_eq!(machine.locate(&[0x11]), None);
}

#[test]
fn repeated_instructions_stand_before_one_element() {
    let mut machine = Machine::long(&[0xf3, 0x48, 0xa5]); // rep movsq
    (machine.cpu.regs.rsi, machine.cpu.regs.rdi) = (0x5_0000, 0x6_0000);
    assert_eq!(machine.locate(&[0x50, 0x60]), None, "zero times");
    machine.cpu.regs.rcx = 1000;
    assert_eq!(machine.locate(&[0x50, 0x60]), access(Load, 0x5_0000, 8));
    assert_eq!(machine.locate(&[0x60]), access(Store, 0x6_0000, 8));
    assert_eq!(machine.locate(&[0x61]), None, "not this iteration");
}

#[test]
fn a_read_modify_write_is_asked_about_twice_and_reported_as_a_store() {
    let mut machine = Machine::long(&[0xf0, 0x48, 0x0f, 0xc7, 0x0e]); // lock cmpxchg16b [rsi]
    machine.cpu.regs.rsi = 0x5_0010;
    assert_eq!(machine.locate(&[0x50]), access(Store, 0x5_0010, 16));
    machine.locate(&[]);
    assert!(machine.asked.borrow().ends_with(&[(0x50, Load), (0x50, Store)]));
}

#[test]
fn the_stack_segment_sizes_the_stack_pointer() {
    let mut machine = Machine::flat32(&[0x66, 0x6a, 0x05]); // push 5, two bytes
    machine.cpu.regs.rsp = 0x5_1000;
    assert_eq!(machine.locate(&[0x50]), access(Store, 0x5_0ffe, 2));
    machine.cpu.sregs.ss.db = 0;
    assert_eq!(machine.locate(&[0x00]), access(Store, 0xffe, 2), "16-bit stack under 32-bit code");
    let mut machine = Machine::real(&[0x6a, 0x05]);
    machine.cpu.sregs.ss.base = 0x5_0000;
    machine.cpu.regs.rsp = 0x7_0000;
    assert_eq!(machine.locate(&[0x5f]), access(Store, 0x5_fffe, 2), "wraps within the segment");
    machine.cpu.sregs.ss.db = 1;
    assert_eq!(machine.locate(&[0xbf]), access(Store, 0xb_fffe, 2));
}

#[test]
fn a_bit_string_reaches_below_its_base() {
    let mut machine = Machine::long(&[0x48, 0x0f, 0xab, 0x06]); // bts [rsi], rax
    machine.cpu.regs.rsi = 0x5_0000;
    machine.cpu.regs.rax = 0u64.wrapping_sub(64 * 512);
    assert_eq!(machine.locate(&[0x4f]), access(Store, 0x4_f000, 8));
    machine.poke(CODE, &[0x48, 0x0f, 0xba, 0x2e, 0x7f]); // bts [rsi], 127: an immediate stays in the word
    assert_eq!(machine.locate(&[0x50]), access(Store, 0x5_0000, 8));
}

#[test]
fn gathers_touch_the_elements_that_are_left() {
    let mut machine = Machine::long(&[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x8e]); // vpgatherdd xmm0, [rsi+xmm1*4], xmm2
    machine.cpu.regs.rsi = 0x5_0000;
    machine.xsave[(160 + 16) / 8] = 0x400 << 32; // indices 0, 0x400, -1, 0
    machine.xsave[(160 + 24) / 8] = 0xffff_ffff;
    machine.xsave[(160 + 32) / 8] = 0x8000_0000_8000_0000;
    machine.xsave[(160 + 40) / 8] = 0x8000_0000;
    assert_eq!(machine.locate(&[0x51, 0x4f]), access(Load, 0x5_1000, 4));
    machine.xsave[(160 + 32) / 8] = 0x8000_0000;
    assert_eq!(machine.locate(&[0x51, 0x4f]), access(Load, 0x4_fffc, 4));
}

#[test]
fn opmasks_suppress_elements() {
    let mut machine = Machine::long(&[0x62, 0xf1, 0x7c, 0x49, 0x11, 0x06]); // vmovups [rsi]{k1}, zmm0
    machine.cpu.regs.rsi = 0x5_0fc8;
    machine.xsave[(1088 + 8) / 8] = 0x3fff;
    assert_eq!(machine.locate(&[0x51]), None);
    machine.xsave[(1088 + 8) / 8] = 0x7fff;
    assert_eq!(machine.locate(&[0x51]), access(Store, 0x5_1000, 4));
}

#[test]
fn a_restore_reads_what_the_header_names() {
    let mut machine = Machine::long(&[0x0f, 0xae, 0x2e]); // xrstor [rsi]
    machine.cpu.regs.rax = 7;
    machine.cpu.regs.rsi = 0x5_1000 - 576;
    assert_eq!(machine.locate(&[0x51]), None);
    machine.poke64(0x5_1000 - 64, 4);
    assert_eq!(machine.locate(&[0x51]), access(Load, 0x5_1000, 256));
}

#[test]
fn an_event_comes_before_the_instruction() {
    let mut machine = Machine::real(&[0xa2, 0, 0]); // mov [0], al
    machine.cpu.sregs.ss.base = 0x5_0000;
    machine.cpu.regs.rsp = 2;
    machine.events.interrupt_injected = 1;
    machine.events.interrupt_nr = 8;
    assert_eq!(machine.locate(&[0, 0x50, 0x5f]), access(Load, 32, 4));
    assert_eq!(machine.locate(&[0x50, 0x5f]), access(Store, 0x5_0000, 2));
    assert_eq!(machine.locate(&[0x5f]), access(Store, 0x5_fffe, 2));
}

/// A gate at vector 14 to a ring-0 handler, from ring 3.
#[test]
fn an_inner_stack_comes_from_the_task_state() {
    let mut machine = Machine::flat32(&[0x90]);
    let sregs = &mut machine.cpu.sregs;
    (sregs.idt.base, sregs.idt.limit) = (0x6000, 0x7ff);
    (sregs.gdt.base, sregs.gdt.limit) = (0x7000, 0xff);
    (sregs.tr.base, sregs.tr.type_, sregs.ss.dpl) = (0x8000, 11, 3);
    machine.poke64(0x6000 + 14 * 8, 0x0000_8e00_0008_0000);
    machine.poke64(0x7008, 0x00cf_9b00_0000_ffff);
    machine.poke64(0x7010, 0x00cf_9301_0000_ffff); // base 0x10000
    machine.poke64(0x8004, 0x10 << 32 | 0x4_0100); // SS0:ESP0
    machine.events =
        Events { exception_injected: 1, exception_nr: 14, exception_has_error_code: 1, ..Default::default() };
    assert_eq!(machine.locate(&[6]), access(Load, 0x6000 + 14 * 8, 8));
    assert_eq!(machine.locate(&[7]), access(Load, 0x7008, 8));
    assert_eq!(machine.locate(&[8]), access(Load, 0x8004, 4));
    assert_eq!(machine.locate(&[0x50]), access(Store, 0x5_00fc, 4));
    machine.locate(&[]);
    let pushes = machine.asked.borrow().iter().filter(|asked| **asked == (0x50, Store)).count();
    assert_eq!(pushes, 6);
}

#[test]
fn far_jumps_and_segment_loads_read_descriptors() {
    let mut machine = Machine::flat32(&[0xea, 0, 0, 1, 0, 0x18, 0]); // jmp 0x18:0x10000
    (machine.cpu.sregs.gdt.base, machine.cpu.sregs.gdt.limit) = (0x7000, 0x1f);
    machine.poke64(0x7018, 0x00cf_9a00_0000_ffff);
    assert_eq!(machine.locate(&[7]), access(Load, 0x7018, 8));
    machine.locate(&[]);
    assert!(machine.asked.borrow().contains(&(7, Store)), "marks it accessed");
    machine.cpu.sregs.gdt.limit = 0x17;
    assert_eq!(machine.locate(&[7]), None, "beyond the table");
    machine.cpu.sregs.gdt.limit = 0x1f;
    machine.poke(CODE, &[0x9a, 0, 0, 1, 0, 0x18, 0]); // call 0x18:0x10000
    machine.cpu.regs.rsp = 0x5_1000;
    assert_eq!(machine.locate(&[7, 0x50]), access(Load, 0x7018, 8));
    assert_eq!(machine.locate(&[0x50]), access(Store, 0x5_0ffc, 4));
    machine.poke(CODE, &[0xff, 0x1e]); // call far [esi]
    machine.cpu.regs.rsi = 0x6_0000;
    machine.poke(0x6_0004, &[0x18, 0]);
    assert_eq!(machine.locate(&[7, 0x60]), access(Load, 0x6_0000, 6));
    assert_eq!(machine.locate(&[7]), access(Load, 0x7018, 8));
    machine.poke(CODE, &[0x8e, 0x1e]); // mov ds, [esi]
    machine.poke(0x6_0000, &[0x08, 0]);
    assert_eq!(machine.locate(&[7]), access(Load, 0x7008, 8));
    machine.poke(CODE, &[0x8e, 0xd8]); // mov ds, eax
    machine.cpu.regs.rax = 0x10;
    assert_eq!(machine.locate(&[7]), access(Load, 0x7010, 8));
    machine.cpu.sregs.cr0 = 0;
    assert_eq!(machine.locate(&[7]), None, "real mode has no descriptors");
}

/// A return to ring 3 pops the outer stack as well, in 32-bit code only if the level changes.
#[test]
fn a_far_return_continues_on_the_outer_stack() {
    let mut machine = Machine::flat32(&[0xcf]); // iretd
    (machine.cpu.sregs.gdt.base, machine.cpu.sregs.gdt.limit) = (0x7000, 0x2f);
    machine.cpu.regs.rsp = 0x5_0ff4;
    machine.poke(0x5_0ff8, &[0x08, 0]);
    assert_eq!(machine.locate(&[0x51]), None);
    machine.poke(0x5_0ff8, &[0x1b, 0]);
    assert_eq!(machine.locate(&[7]), access(Load, 0x7018, 8));
    assert_eq!(machine.locate(&[0x51]), access(Load, 0x5_1000, 8));
}

/// An ordinary instruction must cost a few microseconds at most; printed for the record, not asserted.
#[test]
#[ignore = "a measurement: run with --ignored --nocapture in a release build"]
fn cost_without_system_calls() {
    let mut machine = Machine::long(&[0x48, 0x89, 0x06]);
    machine.cpu.regs.rsi = 0x5_0000;
    prepare();
    let start = std::time::Instant::now();
    for _ in 0..100_000 {
        let found = locate_in(&machine, &machine, &mut |gfn, _| gfn.0 == 0x50);
        assert_eq!(std::hint::black_box(found), Ok(access(Store, 0x5_0000, 8)));
    }
    println!("{:?} per located store", start.elapsed() / 100_000);
}

prop_compose! {
    fn segments()(base in any::<u32>(), db in 0..2u8, l in 0..2u8, dpl in 0..4u8, type_ in 0..16u8) -> Segment {
        Segment { base: u64::from(base) & 0xf_ffff, db, l, dpl, type_, ..Default::default() }
    }
}

prop_compose! {
    fn machines()(
        code in vec(any::<u8>(), 0..16),
        words in vec(prop_oneof![0..MEMORY as u64, any::<u64>()], 16),
        noise in vec((0..MEMORY as u64 / 8, any::<u64>()), 0..200),
        segments in vec(segments(), 7),
        control in (any::<bool>(), any::<bool>(), any::<u64>(), 0..0x10_0000u64, any::<u64>()),
        event in (0..3u8, any::<u8>(), 0..2u8),
    ) -> Machine {
        let mut machine = Machine::long(&code);
        for (at, value) in noise {
            machine.poke64(at * 8, value);
        }
        machine.poke(CODE, &code);
        let r = &mut machine.cpu.regs;
        [r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp] = core::array::from_fn(|at| words[at]);
        r.rflags = words[15];
        let s = &mut machine.cpu.sregs;
        [s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.tr] = core::array::from_fn(|at| segments[at]);
        (s.idt.base, s.gdt.base, s.gdt.limit, s.idt.limit) = (words[8], words[9], 0xfff, 0xfff);
        (s.cr4, s.cr3, s.efer) = (control.2, control.3, control.4);
        s.cr0 = u64::from(control.0) | u64::from(control.1) << 31;
        machine.xsave = words.repeat(32);
        machine.events.exception_injected = event.0 / 2;
        machine.events.exception_nr = event.1;
        machine.events.exception_has_error_code = event.2;
        machine
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whatever the state and memory, the answer is one of the forbidden frames, within one page, and was asked about.
    #[test]
    fn an_answer_is_a_forbidden_frame_whatever_the_guest_holds(machine in machines(), frames in vec(0..256u64, 0..128)) {
        if let Some(found) = machine.locate(&frames) {
            prop_assert!(frames.contains(&(found.gpa >> 12)));
            prop_assert!(found.size >= 1 && (found.gpa & 0xfff) + u64::from(found.size) <= 0x1000);
            let last = machine.asked.borrow().last().copied();
            prop_assert_eq!(last, Some((found.gpa >> 12, found.kind)));
        }
    }

    /// Forbidding less than the first frame asked about, in order, finds that frame and nothing later.
    #[test]
    fn the_first_forbidden_frame_in_order_is_found(machine in machines(), pick in any::<prop::sample::Index>()) {
        machine.locate(&[]);
        let asked = machine.asked.borrow().clone();
        prop_assume!(!asked.is_empty());
        let frame = pick.get(&asked).0;
        let found = machine.locate(&[frame]).map(|access| access.gpa >> 12);
        prop_assert_eq!(found, Some(frame));
        let before = asked.iter().take_while(|(other, _)| *other != frame).count();
        prop_assert!(machine.asked.borrow().starts_with(&asked[..before]));
    }
}
