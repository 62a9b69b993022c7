//! A KVM client without any knowledge of gmem, for comparing what guest private memory did: natively on a kernel that has
//! the feature, and under gmem on one that does not. Run one seed in both places and compare the two transcripts.
//!
//! A line of the transcript is the index, the operation, and after the arrow what happened: exits in brackets with what
//! the client did about them, then the result. The sequence depends on the seed alone. `--skip` leaves operations out
//! without changing the others, so that a difference can be shrunk.
//!
//! | operation | what it compares |
//! |---|---|
//! | `VmCreate`, `VmClose` | types offered and refused; descriptors of VM and vCPU closed in either order, with files open and slots bound |
//! | `Capability`, `EnableHypercalls` | KVM_CHECK_EXTENSION on the device and on a VM; valid bits of KVM_CAP_EXIT_HYPERCALL |
//! | `FileCreate` | KVM_CREATE_GUEST_MEMFD: sizes 0, unaligned, negative, huge; each flag bit; unchecked reserved words |
//! | `FileClose`, `FileDup` | a file that is closed while bound, once and through its duplicates |
//! | `FileCall` | every other system call on the descriptor: stat, read and write in all forms, seek, truncate, sync, re-open, seals, sendfile, splice, copy |
//! | `Fallocate` | modes, alignment and limits of allocate and punch; later accesses show what a punch left |
//! | `FileMap`, `Map*` | mapping rules, and bytes or SIGBUS through a mapping |
//! | `SlotSet`, `SlotDelete` | both versions of KVM_SET_USER_MEMORY_REGION: each check by a spoiled argument, overlaps, moves, flag changes, wrong descriptors, files of another VM |
//! | `DirtyLog` | that pages the guest wrote are logged (more may be) |
//! | `Attributes` | argument checks and range edges; later accesses show what was set |
//! | `PreFault` | argument checks, partial progress, absent slots, private and shared |
//! | `BadPointer` | EFAULT for a pointer to nothing |
//! | `Guest` | loads, stores, locked add, string fill and copy, sums, instruction fetches and KVM_HC_MAP_GPA_RANGE; exits with gpa, size and flags; accesses that go on after the client resolved a fault |
//! | `Host*` | shared memory as the host sees it, of five kinds of mapping, and madvise on it |
//! | `Fork` | what a child may do with inherited descriptors |
//!
//! Not compared, because the kernel itself does not promise it: which pages beyond those written a dirty log has, accesses
//! in which KVM's instruction emulator would meet private memory, and accesses to private pages for which KVM may still
//! hold an entry for MMIO (see `world/guest.rs`).

mod agent;
mod bench;
mod churn;
mod generate;
mod machine;
mod ops;
mod race;
mod sys;
mod transcript;
mod world;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use generate::Surface;
use world::World;

/// A KVM client that exercises guest private memory and prints what happened.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// The sequence.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Its length.
    #[arg(long, default_value_t = 500)]
    ops: usize,
    /// Which operations it is made of.
    #[arg(long, value_enum, default_value = "all")]
    surface: Surface,
    /// Indexes that are generated but not performed.
    #[arg(long, value_delimiter = ',')]
    skip: Vec<usize>,
    /// The VM type under test instead of the best one that the host offers.
    #[arg(long)]
    vm_type: Option<u64>,
    /// Print the operations without performing them.
    #[arg(long, conflicts_with_all = ["race", "churn"])]
    list: bool,
    /// Let vCPUs race with conversions, punches, slots and closes for so many seconds instead.
    #[arg(long, value_name = "SECONDS", conflicts_with = "churn")]
    race: Option<u64>,
    /// Create, use and destroy so many worlds instead, and fail if the process grows.
    #[arg(long, value_name = "ROUNDS")]
    churn: Option<u64>,
    /// Measure how long one operation takes instead.
    #[arg(long, value_enum, conflicts_with_all = ["race", "churn", "list"])]
    bench: Option<bench::Bench>,
}

fn main() -> ExitCode {
    // A child that dies of SIGBUS on purpose must not leave a core file.
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: one structure, read only.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gmem-conformance: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    let tested = args.vm_type.or((args.surface == Surface::File).then_some(sys::VM_TYPE_DEFAULT));
    if let Some(bench) = args.bench {
        return bench::run(bench);
    }
    match (args.race, args.churn) {
        (Some(seconds), _) => race::run(seconds, args.seed),
        (None, Some(rounds)) => churn::run(rounds, args.surface, tested),
        (None, None) if args.list => list(args),
        (None, None) => perform(args, tested),
    }
}

fn list(args: &Args) -> anyhow::Result<()> {
    let mut out = std::io::LineWriter::new(std::io::stdout().lock());
    for (index, op) in generate::sequence(args.seed, args.ops, args.surface).into_iter().enumerate() {
        writeln!(out, "{index:05} {op:?}")?;
    }
    Ok(())
}

/// The transcript; each line is written before the next operation, so that a crash shows where it was.
fn perform(args: &Args, tested: Option<u64>) -> anyhow::Result<()> {
    let mut out = std::io::LineWriter::new(std::io::stdout().lock());
    let mut world = World::new(tested).context("cannot open /dev/kvm")?;
    for (index, op) in generate::sequence(args.seed, args.ops, args.surface).into_iter().enumerate() {
        if !args.skip.contains(&index) {
            writeln!(out, "{index:05} {op:?} => {}", world.perform(op))?;
        }
    }
    Ok(())
}
