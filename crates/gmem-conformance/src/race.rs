//! `--race SECONDS`: two vCPUs write and read back while other threads convert, punch, prefault, delete and re-add slots
//! and close files.
//!
//! Three slots, each with pages for each vCPU:
//!
//! - *strict* pages (first half of each vCPU's block of slot 0) are private and nobody converts or punches them, but
//!   their neighbours are, their slot is deleted and created again, and they are prefaulted. No write may be lost: each
//!   round of the guest's own loop finds what the round before wrote, and the only exit is a memory fault, private, at
//!   exactly the page that the guest is about to access. The host must never see any of it.
//! - *loose* pages (the rest of slot 0, and slot 1) are converted and punched. A load finds zero or something that this
//!   vCPU once wrote to this very page.
//! - *orphan* pages (slot 2) lose their file. What holds for loose pages holds for them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use kvm_bindings::kvm_regs;
use rand_core::{Rng as _, SeedableRng};
use rand_xorshift::XorShiftRng;

use crate::agent::{self, PAGE, Stub, WINDOW};
use crate::machine::{Exit, Kvm, Machine, Mapping, Vcpu};
use crate::sys::{self, Attributes, CreateGmem, Errno, PreFault, Region2, Sys, check, off};

const VCPUS: u64 = 2;
/// Pages of a vCPU in a slot.
const BLOCK: u64 = 64;
/// Pages of a vCPU's block in slot 0 that are left alone.
const STRICT: u64 = 32;
const SLOT_PAGES: u64 = BLOCK * VCPUS;
const SLOT_LEN: u64 = SLOT_PAGES * PAGE;
const SLOTS: u64 = 3;
const ORPHAN: u64 = 2;
/// Distance between slots in the guest's memory.
const STRIDE: u64 = 2 << 20;
/// How long one access may go without an end.
const STUCK: Duration = Duration::from_secs(30);

struct Race {
    vm: i32,
    host: Mapping,
    /// One descriptor for each slot.
    files: [i32; 2],
    /// Keeps prefaults and slot changes apart: Linux 6.12 retries a prefault of a slot in deletion inside the kernel,
    /// while it holds the SRCU read lock that the deletion waits for, so the two wait for each other until a signal
    /// comes. (Linux 7.3 answers EAGAIN.)
    slots_still: Mutex<()>,
    stop: AtomicBool,
    violation: Mutex<Option<String>>,
    counts: [AtomicU64; COUNTS.len()],
}

const COUNTS: [&str; 8] = ["rounds", "accesses", "faults", "mmio", "conversions", "punches", "prefaults", "slots"];

#[derive(Clone, Copy)]
enum Count {
    Rounds,
    Accesses,
    Faults,
    Mmio,
    Conversions,
    Punches,
    Prefaults,
    Slots,
}

/// What a thread returns: the first thing that must not happen ends it.
type Verdict = Result<(), String>;

/// Runs the race and fails at the first violation.
pub(crate) fn run(seconds: u64, seed: u64) -> anyhow::Result<()> {
    let kvm = Kvm::open().context("cannot open /dev/kvm")?;
    if kvm.best_type() != sys::VM_TYPE_SW_PROTECTED {
        bail!("--race needs a kernel that offers VM type {} (SW_PROTECTED)", sys::VM_TYPE_SW_PROTECTED);
    }
    let machine = Machine::new(&kvm, sys::VM_TYPE_SW_PROTECTED)?;
    let race = Race::new(machine.fd)?;
    let vcpus = (0..=VCPUS).map(|id| Vcpu::new(&kvm, machine.fd, id)).collect::<Sys<Vec<_>>>()?;
    let orphan = race.create_file()?;
    race.set_slot(ORPHAN, orphan, SLOT_LEN)?;

    thread::scope(|scope| {
        let race = &race;
        for (id, vcpu) in (0..VCPUS).zip(&vcpus) {
            scope.spawn(move || race.guard(|| race.guest(id, vcpu, seed)));
        }
        let prefaulter = &vcpus[2];
        scope.spawn(move || race.guard(|| race.prefault(prefaulter, seed)));
        scope.spawn(move || race.guard(|| race.convert(seed)));
        scope.spawn(move || race.guard(|| race.punch(seed)));
        scope.spawn(move || race.guard(|| race.slots(seed)));
        scope.spawn(move || race.guard(|| race.orphans(orphan)));
        scope.spawn(move || race.guard(|| race.watch()));
        let end = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < end && !race.stop.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(50));
        }
        race.stop.store(true, Ordering::Relaxed);
    });
    for (name, count) in COUNTS.iter().zip(&race.counts) {
        println!("{name}: {}", count.load(Ordering::Relaxed));
    }
    match race.violation.lock().map(|v| v.clone()) {
        Ok(None) => Ok(()),
        Ok(Some(what)) => bail!("{what}"),
        Err(_) => bail!("a thread panicked"),
    }
}

impl Race {
    fn new(vm: i32) -> Sys<Self> {
        let len = usize::try_from(STRIDE * SLOTS).unwrap_or(0);
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let mut race = Self {
            vm,
            host: Mapping::new(len, prot, flags, -1)?,
            files: [-1; 2],
            slots_still: Mutex::new(()),
            stop: AtomicBool::new(false),
            violation: Mutex::new(None),
            counts: Default::default(),
        };
        for slot in 0..2 {
            let file = race.create_file()?;
            race.files[usize::from(slot > 0)] = file;
            race.set_slot(slot, file, SLOT_LEN)?;
        }
        race.set_attributes(WINDOW, STRIDE * SLOTS, true)?;
        Ok(race)
    }

    fn guard(&self, act: impl FnOnce() -> Verdict) {
        if let Err(what) = act() {
            self.stop.store(true, Ordering::Relaxed);
            if let Ok(mut first) = self.violation.lock() {
                first.get_or_insert(what);
            }
        }
    }

    fn going(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn count(&self, what: Count) {
        self.counts[what as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn create_file(&self) -> Sys<i32> {
        let mut claim = CreateGmem { size: SLOT_LEN, ..Default::default() };
        sys::ioctl(self.vm, sys::KVM_CREATE_GUEST_MEMFD, &mut claim).map(sys::fd_of)
    }

    fn set_slot(&self, slot: u64, file: i32, size: u64) -> Sys<i64> {
        let mut region = Region2 {
            slot: u32::try_from(slot).unwrap_or(0),
            flags: sys::KVM_MEM_GUEST_MEMFD,
            gpa: WINDOW + slot * STRIDE,
            size,
            hva: self.host.at as u64 + slot * STRIDE,
            gmem_fd: file.cast_unsigned(),
            ..Default::default()
        };
        sys::ioctl(self.vm, sys::KVM_SET_USER_MEMORY_REGION2, &mut region)
    }

    fn set_attributes(&self, gpa: u64, size: u64, private: bool) -> Sys<i64> {
        let attributes = if private { sys::KVM_MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
        let mut claim = Attributes { address: gpa, size, attributes, flags: 0 };
        sys::ioctl(self.vm, sys::KVM_SET_MEMORY_ATTRIBUTES, &mut claim)
    }

    /// Both kinds of access in turn; a last strict round when everything else has stopped.
    fn guest(&self, id: u64, vcpu: &Vcpu, seed: u64) -> Verdict {
        let mut rng = XorShiftRng::seed_from_u64(seed ^ id);
        let (mut round, mut sequence) = (0, 0);
        while self.going() {
            self.strict_round(id, vcpu, round)?;
            round += 1;
            for _ in 0..16 {
                sequence += 1;
                self.loose_access(id, vcpu, &mut rng, sequence)?;
            }
        }
        Ok(())
    }

    fn strict_round(&self, id: u64, vcpu: &Vcpu, round: u64) -> Verdict {
        let base = WINDOW + id * BLOCK * PAGE;
        let value = |round: u64| if round == 0 { 0 } else { tag(id, 0, round) };
        let registers = agent::entry(Stub::Stress, 0);
        let regs = kvm_regs { rbx: base, rcx: STRICT, rax: value(round), rdx: value(round + 1), ..registers };
        vcpu.set_regs(&regs).map_err(|errno| format!("KVM_SET_REGS {errno}"))?;
        let begun = Instant::now();
        loop {
            match vcpu.run() {
                Exit::Port(agent::DONE_PORT) => break,
                Exit::Port(agent::WRONG_PORT) => return Err(self.lost(id, vcpu, round)),
                Exit::MemoryFault { errno: Errno(libc::EFAULT), flags, gpa, size } => {
                    self.count(Count::Faults);
                    let at = vcpu.regs().map_or(0, |regs| regs.rbx) & !(PAGE - 1);
                    if (flags, gpa, size) != (sys::KVM_MEMORY_EXIT_FLAG_PRIVATE, at, PAGE) {
                        return Err(format!(
                            "vcpu {id} at {at:#x}: fault flags {flags:#x} gpa {gpa:#x} size {size:#x}"
                        ));
                    }
                    if !self.going() {
                        return Ok(());
                    }
                }
                other => return Err(format!("vcpu {id} in strict round {round}: {other:?}")),
            }
            if begun.elapsed() > STUCK {
                return Err(format!("vcpu {id} is stuck in strict round {round}"));
            }
        }
        self.count(Count::Rounds);
        Ok(())
    }

    fn lost(&self, id: u64, vcpu: &Vcpu, round: u64) -> String {
        let regs = vcpu.regs().unwrap_or_default();
        format!("vcpu {id} round {round}: page {:#x} does not hold {:#x} at both ends", regs.rbx, regs.rax)
    }

    /// Loads from a loose page, judges what it found, and stores something new.
    fn loose_access(&self, id: u64, vcpu: &Vcpu, rng: &mut XorShiftRng, sequence: u64) -> Verdict {
        let (slot, page) = match rng.next_u64() % 4 {
            0 => (0, STRICT + rng.next_u64() % (BLOCK - STRICT)),
            1 => (ORPHAN, rng.next_u64() % BLOCK),
            _ => (1, rng.next_u64() % BLOCK),
        };
        let gpa = WINDOW + slot * STRIDE + (id * BLOCK + page) * PAGE + (rng.next_u64() % (PAGE / 8)) * 8;
        let load = kvm_regs { rbx: gpa, ..agent::entry(Stub::Load, 3) };
        if let Some(found) = self.access(id, vcpu, &load, gpa)?
            && !may_find(id, gpa, sequence, found)
        {
            return Err(format!("vcpu {id} found {found:#x} at {gpa:#x} in access {sequence}"));
        }
        let store = kvm_regs { rbx: gpa, rdx: tag(id, gpa, sequence), ..agent::entry(Stub::Store, 3) };
        self.access(id, vcpu, &store, gpa)?;
        self.count(Count::Accesses);
        Ok(())
    }

    /// Runs a stub; `None` if memory did not answer: MMIO, or a fault that did not go away.
    fn access(&self, id: u64, vcpu: &Vcpu, regs: &kvm_regs, address: u64) -> Result<Option<u64>, String> {
        vcpu.set_regs(regs).map_err(|errno| format!("KVM_SET_REGS {errno}"))?;
        let (mut faults, mut mmio) = (0, false);
        loop {
            match vcpu.run() {
                Exit::Port(agent::DONE_PORT) => {
                    let rax = vcpu.regs().map_err(|errno| format!("KVM_GET_REGS {errno}"))?.rax;
                    return Ok((!mmio).then_some(rax));
                }
                Exit::Mmio { gpa, len: 8, .. } if gpa == address && !mmio => {
                    self.count(Count::Mmio);
                    vcpu.answer_mmio([0; 8]);
                    mmio = true;
                }
                // Without the flag too: the attribute may have changed between the fault and the look at it.
                Exit::MemoryFault { errno: Errno(libc::EFAULT), flags, gpa, size }
                    if flags & !sys::KVM_MEMORY_EXIT_FLAG_PRIVATE == 0
                        && (gpa, size) == (address & !(PAGE - 1), PAGE) =>
                {
                    self.count(Count::Faults);
                    faults += 1;
                    if faults == 3 {
                        return Ok(None);
                    }
                }
                other => return Err(format!("vcpu {id} at {address:#x}: {other:?}")),
            }
        }
    }

    /// A loose range: in slot 0 the second half of one vCPU's block, in slot 1 anything.
    fn loose_range(rng: &mut XorShiftRng) -> (u64, u64, u64) {
        let mut below = |n: u64| rng.next_u64() % n;
        let (slot, first, room) =
            if below(3) == 0 { (0, below(VCPUS) * BLOCK + STRICT, BLOCK - STRICT) } else { (1, 0, SLOT_PAGES) };
        let start = below(room);
        let pages = 1 + below(room - start);
        (slot, first + start, if below(2) == 0 { pages.min(2) } else { pages })
    }

    fn convert(&self, seed: u64) -> Verdict {
        let mut rng = XorShiftRng::seed_from_u64(seed ^ 0x10);
        while self.going() {
            let (slot, page, pages) = Self::loose_range(&mut rng);
            let private = rng.next_u64() % 2 == 0;
            self.set_attributes(WINDOW + slot * STRIDE + page * PAGE, pages * PAGE, private)
                .map_err(|errno| format!("KVM_SET_MEMORY_ATTRIBUTES {errno}"))?;
            self.count(Count::Conversions);
        }
        Ok(())
    }

    fn punch(&self, seed: u64) -> Verdict {
        let mut rng = XorShiftRng::seed_from_u64(seed ^ 0x20);
        while self.going() {
            let (slot, page, pages) = Self::loose_range(&mut rng);
            let mode = libc::FALLOC_FL_KEEP_SIZE | if rng.next_u64() % 3 == 0 { 0 } else { libc::FALLOC_FL_PUNCH_HOLE };
            let file = self.files[usize::from(slot > 0)];
            // SAFETY: no memory is passed.
            check(unsafe { libc::fallocate(file, mode, off(page * PAGE), off(pages * PAGE)) })
                .map_err(|errno| format!("fallocate mode {mode} {errno}"))?;
            self.count(Count::Punches);
        }
        Ok(())
    }

    fn prefault(&self, vcpu: &Vcpu, seed: u64) -> Verdict {
        let mut rng = XorShiftRng::seed_from_u64(seed ^ 0x30);
        while self.going() {
            let gpa = WINDOW + (rng.next_u64() % SLOTS) * STRIDE + (rng.next_u64() % SLOT_PAGES) * PAGE;
            let size = (1 + rng.next_u64() % 16) * PAGE;
            let mut claim = PreFault { gpa, size, ..Default::default() };
            let still = self.slots_still.lock();
            let outcome = sys::ioctl(vcpu.fd, sys::KVM_PRE_FAULT_MEMORY, &mut claim);
            drop(still);
            let advanced = claim.gpa.wrapping_sub(gpa);
            let consistent = claim.size == size.wrapping_sub(advanced) && advanced <= size;
            let known = match outcome {
                Ok(_) => advanced > 0,
                Err(Errno(errno)) => {
                    let known = [libc::ENOENT, libc::EFAULT, libc::EAGAIN, libc::EINTR];
                    advanced == 0 && known.contains(&errno)
                }
            };
            if !known || !consistent {
                return Err(format!(
                    "prefault {gpa:#x}+{size:#x}: {outcome:?}, left {:#x}+{:#x}",
                    claim.gpa, claim.size
                ));
            }
            self.count(Count::Prefaults);
        }
        Ok(())
    }

    fn delete_slot(&self, slot: u64) -> Verdict {
        let _still = self.slots_still.lock();
        self.set_slot(slot, -1, 0).map(|_| ()).map_err(|errno| format!("delete of slot {slot}: {errno}"))
    }

    fn slots(&self, seed: u64) -> Verdict {
        let mut rng = XorShiftRng::seed_from_u64(seed ^ 0x40);
        while self.going() {
            let slot = rng.next_u64() % 2;
            let file = self.files[usize::from(slot > 0)];
            self.delete_slot(slot)?;
            self.set_slot(slot, file, SLOT_LEN).map_err(|errno| format!("slot create {errno}"))?;
            self.count(Count::Slots);
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Closes the file of a bound slot, and later binds a new one.
    fn orphans(&self, mut file: i32) -> Verdict {
        while self.going() {
            sys::close(file).map_err(|errno| format!("close {errno}"))?;
            thread::sleep(Duration::from_millis(2));
            self.delete_slot(ORPHAN)?;
            file = self.create_file().map_err(|errno| format!("KVM_CREATE_GUEST_MEMFD {errno}"))?;
            self.set_slot(ORPHAN, file, SLOT_LEN).map_err(|errno| format!("orphan create {errno}"))?;
            self.count(Count::Slots);
            thread::sleep(Duration::from_millis(5));
        }
        sys::close(file).map(|_| ()).map_err(|errno| format!("close {errno}"))
    }

    /// The host's view: nothing of the strict pages, and in loose pages only what belongs there.
    fn watch(&self) -> Verdict {
        while self.going() {
            for (page, id) in (0..SLOT_PAGES).map(|page| (page, page / BLOCK)) {
                let at = usize::try_from(page * PAGE).unwrap_or(0);
                let found = self.host.word(at);
                let strict = page % BLOCK < STRICT;
                if found != 0 && (strict || !may_find(id, WINDOW + page * PAGE, u64::MAX >> 40, found)) {
                    return Err(format!("the host finds {found:#x} in page {page} of slot 0"));
                }
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Race {
    fn drop(&mut self) {
        for file in self.files {
            let _ = sys::close(file);
        }
    }
}

/// A value that says who wrote it, where, and when: bits 63:60 a mark, 59:56 the vCPU, 55:24 the gpa in quadwords, 23:0
/// the number of the access.
fn tag(id: u64, gpa: u64, sequence: u64) -> u64 {
    0xa << 60 | id << 56 | (gpa / 8) << 24 | (sequence & 0xff_ffff)
}

fn may_find(id: u64, gpa: u64, sequence: u64, found: u64) -> bool {
    let written = found & 0xff_ffff;
    found == 0 || (found == tag(id, gpa, written) && (written < sequence || sequence > 0xff_ffff))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_written_there_may_be_found() {
        let (here, there) = (WINDOW + 8, WINDOW + 16);
        assert!(may_find(1, here, 9, 0));
        assert!(may_find(1, here, 9, tag(1, here, 8)));
        assert!(!may_find(1, here, 9, tag(1, here, 9)));
        assert!(!may_find(1, here, 9, tag(1, there, 8)));
        assert!(!may_find(1, here, 9, tag(0, here, 8)));
        assert!(!may_find(1, here, 9, 0x5a5a));
    }

    #[test]
    fn loose_ranges_leave_the_strict_pages_alone() {
        let mut rng = XorShiftRng::seed_from_u64(1);
        for _ in 0..10_000 {
            let (slot, page, pages) = Race::loose_range(&mut rng);
            assert!(page + pages <= SLOT_PAGES);
            assert!(slot == 1 || (page % BLOCK >= STRICT && page % BLOCK + pages <= BLOCK));
        }
    }
}
