//! `--bench NAME`: how long one operation takes, in nanoseconds, as a line `NAME NANOSECONDS`.
//!
//! Compared natively and under gmem by a program that knows both; the numbers alone say little in an emulated machine.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use kvm_bindings::kvm_regs;

use crate::agent::{self, PAGE, Stub, WINDOW};
use crate::machine::{Exit, Kvm, Machine, Mapping, Vcpu};
use crate::sys::{self, Attributes, CreateGmem, Region2, Sys};

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bench {
    /// KVM_SET_MEMORY_ATTRIBUTES of 16 GiB without a slot, to private.
    Mark16g,
    /// The same of 1 TiB; fails if it costs more than 1 MiB of memory.
    Mark1t,
    /// A conversion of one page of a bound slot and the vCPU's next access to it, in both directions.
    Convert,
    /// KVM_GET_API_VERSION, which nobody has a reason to change.
    Version,
    /// KVM_GET_REGS, the same for a vCPU.
    Registers,
    /// KVM_RUN up to the guest's next port output.
    Exit,
}

/// Rounds go on for so long.
const ENOUGH: Duration = Duration::from_millis(500);

/// Runs one of them.
pub(crate) fn run(bench: Bench) -> anyhow::Result<()> {
    let kvm = Kvm::open().context("cannot open /dev/kvm")?;
    let nanoseconds = match bench {
        Bench::Mark16g => mark(&kvm, 16 << 30)?.as_secs_f64() * 1e9,
        Bench::Mark1t => mark_within(&kvm, 1 << 40, 1024)?,
        Bench::Convert => Conversion::new(&kvm)?.rounds()?,
        Bench::Version => quickest(|| Ok(sys::ioctl_value(kvm.fd, sys::KVM_GET_API_VERSION, 0).map(|_| ())?))?,
        Bench::Registers => {
            let (_machine, vcpu) = guest(&kvm, sys::VM_TYPE_DEFAULT)?;
            quickest(|| Ok(vcpu.regs().map(|_| ())?))?
        }
        Bench::Exit => exits(&kvm)?,
    };
    let name = bench.to_possible_value();
    println!("{} {nanoseconds:.0}", name.as_ref().map_or("", |name| name.get_name()));
    Ok(())
}

/// Nanoseconds of one round, on average: with what it leaves behind for the kernel to do later.
fn rounds(round: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let batches = batches(round)?;
    Ok(batches.iter().sum::<f64>() / batches.len() as f64)
}

/// The same of the quickest rounds, for calls that leave nothing behind: other work on the machine only adds.
fn quickest(round: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    Ok(batches(round)?.into_iter().fold(f64::INFINITY, f64::min))
}

/// Nanoseconds of one round, in batch after batch. The first rounds only warm up.
fn batches(mut round: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<Vec<f64>> {
    const BATCH: u32 = 64;
    let mut batch = || -> anyhow::Result<f64> {
        let begin = Instant::now();
        for _ in 0..BATCH {
            round()?;
        }
        Ok(begin.elapsed().as_secs_f64() * 1e9 / f64::from(BATCH))
    };
    batch()?;
    let begin = Instant::now();
    let mut all = vec![batch()?];
    while begin.elapsed() < ENOUGH {
        all.push(batch()?);
    }
    Ok(all)
}

fn guest(kvm: &Kvm, kind: u64) -> Sys<(Machine, Vcpu)> {
    let machine = Machine::new(kvm, kind)?;
    let vcpu = Vcpu::new(kvm, machine.fd, 0)?;
    Ok((machine, vcpu))
}

fn set_attributes(vm: i32, address: u64, size: u64, attributes: u64) -> Sys<i64> {
    sys::ioctl(vm, sys::KVM_SET_MEMORY_ATTRIBUTES, &mut Attributes { address, size, attributes, flags: 0 })
}

/// Once: what was marked before is quicker to mark again.
fn mark(kvm: &Kvm, size: u64) -> anyhow::Result<Duration> {
    let machine = Machine::new(kvm, sys::VM_TYPE_SW_PROTECTED)?;
    // The first page is apart: it warms up everything that does not depend on the size.
    set_attributes(machine.fd, 1 << 42, PAGE, sys::KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    let begin = Instant::now();
    set_attributes(machine.fd, 1 << 32, size, sys::KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    Ok(begin.elapsed())
}

fn mark_within(kvm: &Kvm, size: u64, kib: u64) -> anyhow::Result<f64> {
    let before = crate::churn::resident_kib()?;
    let took = mark(kvm, size)?;
    let grown = crate::churn::resident_kib()?.saturating_sub(before);
    if grown > kib {
        bail!("marking {size:#x} bytes took {grown} KiB");
    }
    Ok(took.as_secs_f64() * 1e9)
}

/// A page that changes sides.
struct Conversion {
    machine: Machine,
    vcpu: Vcpu,
    file: i32,
    _host: Mapping,
}

impl Conversion {
    const LEN: u64 = 2 << 20;

    fn new(kvm: &Kvm) -> Sys<Self> {
        let (machine, vcpu) = guest(kvm, sys::VM_TYPE_SW_PROTECTED)?;
        let len = usize::try_from(Self::LEN).unwrap_or(0);
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let host = Mapping::new(len, prot, flags, -1)?;
        let mut claim = CreateGmem { size: Self::LEN, ..Default::default() };
        let file = sys::ioctl(machine.fd, sys::KVM_CREATE_GUEST_MEMFD, &mut claim).map(sys::fd_of)?;
        let mut region = Region2 {
            flags: sys::KVM_MEM_GUEST_MEMFD,
            gpa: WINDOW,
            size: Self::LEN,
            hva: host.at as u64,
            gmem_fd: file.cast_unsigned(),
            ..Default::default()
        };
        sys::ioctl(machine.fd, sys::KVM_SET_USER_MEMORY_REGION2, &mut region)?;
        Ok(Self { machine, vcpu, file, _host: host })
    }

    fn rounds(&self) -> anyhow::Result<f64> {
        let both = rounds(|| {
            self.convert(sys::KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
            self.convert(0)
        })?;
        Ok(both / 2.0)
    }

    fn convert(&self, attributes: u64) -> anyhow::Result<()> {
        let page = WINDOW + 5 * PAGE;
        set_attributes(self.machine.fd, page, PAGE, attributes)?;
        self.vcpu.set_regs(&kvm_regs { rbx: page, ..agent::entry(Stub::Store, 3) })?;
        match self.vcpu.run() {
            Exit::Port(agent::DONE_PORT) => Ok(()),
            other => bail!("the vCPU's access ended with {other:?}"),
        }
    }
}

impl Drop for Conversion {
    fn drop(&mut self) {
        let _ = sys::close(self.file);
    }
}

fn exits(kvm: &Kvm) -> anyhow::Result<f64> {
    let (_machine, vcpu) = guest(kvm, kvm.best_type())?;
    vcpu.set_regs(&agent::entry(Stub::Exits, 0))?;
    quickest(|| match vcpu.run() {
        Exit::Port(agent::DONE_PORT) => Ok(()),
        other => bail!("the guest's output ended with {other:?}"),
    })
}
