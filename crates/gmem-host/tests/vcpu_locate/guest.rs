//! A machine of 2 MiB and two pages with one vCPU, whose memory has two mappings: the window that KVM uses, in which pages come and
//! go, and the test's own.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::time::Instant;

use gmem_host::vcpu::{self, Access, GuestView, RunArea};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

pub(crate) const SIZE: usize = 2 << 20;
/// Two pages behind the memory, each with a memslot of its own while it is allowed; without one they are a device's.
/// The guest's linear address of them is [`DEVICE_LINEAR`].
pub(crate) const DEVICE: u64 = SIZE as u64;
pub(crate) const DEVICE_LINEAR: u64 = 0x40_0000;
const WHOLE: usize = SIZE + 0x2000;
pub(crate) const IDT: u64 = 0x1000;
pub(crate) const GDT: u64 = 0x2000;
pub(crate) const TSS: u64 = 0x3000;
const PML4: u64 = 0x4000;
const PDPT: u64 = 0x5000;
const PD: u64 = 0x6000;
const PT: u64 = 0x7000;
pub(crate) const IST: u64 = 0x9000;
const CODE: u64 = 0x1_0000;
const HANDLER: u64 = 0x1_1000;
const STACK: u64 = 0x2_8000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    Long,
    Real,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reg {
    Rax,
    Rcx,
    Rsi,
    Rdi,
    Rsp,
    Rbp,
}

/// How a program ended.
pub(crate) struct Outcome {
    pub(crate) reported: Vec<Access>,
    pub(crate) regs: kvm_regs,
    pub(crate) memory: Vec<u8>,
    /// What the host makes of a forbidden access.
    pub(crate) how: &'static str,
}

pub(crate) struct Guest {
    vcpu: VcpuFd,
    vm: VmFd,
    memory: OwnedFd,
    window: NonNull<u8>,
    own: NonNull<u8>,
    clean_sregs: kvm_sregs,
    clean_events: kvm_vcpu_events,
    cost: Option<String>,
    /// What memory holds before a program: nothing that code or a table could be taken for, and no two words alike nearby.
    pattern: Vec<u8>,
    /// What this host made of the first forbidden access.
    pub(crate) host: &'static str,
}

/// The test's own mapping.
struct Own(NonNull<u8>);

impl GuestView for Own {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> bool {
        let Some(at) = usize::try_from(gpa).ok().filter(|at| at.saturating_add(buf.len()) <= WHOLE) else {
            return false;
        };
        // SAFETY: in bounds of the mapping of WHOLE bytes that lives as long as the test; no vCPU runs meanwhile.
        unsafe { ptr::copy_nonoverlapping(self.0.add(at).as_ptr(), buf.as_mut_ptr(), buf.len()) };
        true
    }
}

fn map(fd: &OwnedFd, at: Option<NonNull<u8>>, offset: u64, len: usize, prot: i32) -> Result<NonNull<u8>, String> {
    let fixed = if at.is_some() { libc::MAP_FIXED } else { 0 };
    let hint = at.map_or(ptr::null_mut(), NonNull::as_ptr);
    // SAFETY: a fixed address is only ever one inside the window, which nothing but the guest uses.
    let got =
        unsafe { libc::mmap(hint.cast(), len, prot, libc::MAP_SHARED | fixed, fd.as_raw_fd(), offset.cast_signed()) };
    if got == libc::MAP_FAILED { Err("mmap failed".into()) } else { NonNull::new(got.cast()).ok_or("null".into()) }
}

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

impl Guest {
    pub(crate) fn new() -> Result<Self, String> {
        extern "C" fn ignore(_: i32) {}
        // SAFETY: the handler does nothing. Without SA_RESTART the signal interrupts KVM_RUN.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as *const () as usize;
            libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut());
        }
        let kvm = Kvm::new().map_err(|errno| format!("/dev/kvm: {errno}"))?;
        let vm = kvm.create_vm().map_err(|errno| format!("KVM_CREATE_VM: {errno}"))?;
        // SAFETY: a fresh descriptor that nothing else owns; a failure is the -1 that the check below refuses.
        let raw = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
        if raw < 0 {
            return Err("memfd_create".into());
        }
        // SAFETY: as above.
        let memory = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: plain system call on our own descriptor.
        unsafe { libc::ftruncate(memory.as_raw_fd(), WHOLE as i64) };
        let window = map(&memory, None, 0, WHOLE, READ_WRITE)?;
        let own = map(&memory, None, 0, WHOLE, READ_WRITE)?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: SIZE as u64,
            userspace_addr: window.as_ptr() as u64,
        };
        // SAFETY: the region is the window, which stays reserved until the process ends.
        unsafe { vm.set_user_memory_region(region) }.map_err(|errno| format!("memslot: {errno}"))?;
        let vcpu = vm.create_vcpu(0).map_err(|errno| format!("KVM_CREATE_VCPU: {errno}"))?;
        let clean_sregs = vcpu.get_sregs().map_err(|errno| format!("KVM_GET_SREGS: {errno}"))?;
        let clean_events = vcpu.get_vcpu_events().unwrap_or_default();
        if let Ok(cpuid) = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES) {
            let _ = vcpu.set_cpuid2(&cpuid);
        }
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = 7;
        // Without AVX the programs that use it cannot run and are skipped.
        let _ = vcpu.set_xcrs(&xcrs);
        let pattern = (0..251).flat_map(|byte| [byte; 8]).cycle().take(WHOLE).collect();
        let mut guest =
            Self { vcpu, vm, memory, window, own, clean_sregs, clean_events, cost: None, pattern, host: "" };
        guest.allow(DEVICE, true);
        guest.allow(DEVICE + 0x1000, true);
        Ok(guest)
    }

    fn write(&mut self, gpa: u64, bytes: &[u8]) {
        let at = usize::try_from(gpa).unwrap();
        assert!(at + bytes.len() <= WHOLE);
        // SAFETY: in bounds of the test's own mapping; no vCPU runs meanwhile.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.own.add(at).as_ptr(), bytes.len()) };
    }

    fn write64(&mut self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    /// Every page of the window maps its page of the file, or nothing.
    fn allow(&mut self, gpa: u64, allowed: bool) {
        let at = self.window.as_ptr().wrapping_add(usize::try_from(gpa).unwrap());
        if gpa >= DEVICE {
            return self.set_slot(gpa, at as u64, allowed);
        }
        let prot = if allowed { READ_WRITE } else { libc::PROT_NONE };
        map(&self.memory, NonNull::new(at), gpa, 0x1000, prot).unwrap();
    }

    fn set_slot(&mut self, gpa: u64, userspace_addr: u64, present: bool) {
        let slot = 1 + u32::from(gpa != DEVICE);
        let memory_size = if present { 0x1000 } else { 0 };
        let region = kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr: gpa, memory_size, userspace_addr };
        // SAFETY: a page of the window, which stays reserved until the process ends.
        unsafe { self.vm.set_user_memory_region(region) }.unwrap();
    }

    /// Fresh memory and registers, with `code` about to run.
    pub(crate) fn start(&mut self, mode: Mode, code: &[u8], at: u64, regs: &[(Reg, u64)]) {
        let pattern = std::mem::take(&mut self.pattern);
        self.write(0, &pattern);
        self.pattern = pattern;
        self.write(0x1000, &[0; 0x9000]);
        self.write_tables();
        let at = if at == 0 { CODE } else { at };
        self.write(at, code);
        self.write(HANDLER, &[0xf4]);
        let mut sregs = self.clean_sregs;
        let mut state = kvm_regs { rflags: 2, rsp: STACK, ..Default::default() };
        match mode {
            Mode::Long => long_mode(&mut sregs),
            Mode::Real => self.real_mode(&mut sregs),
        }
        state.rip = at - sregs.cs.base;
        for (reg, value) in regs {
            match reg {
                Reg::Rax => state.rax = *value,
                Reg::Rcx => state.rcx = *value,
                Reg::Rsi => state.rsi = *value,
                Reg::Rdi => state.rdi = *value,
                Reg::Rsp => state.rsp = *value,
                Reg::Rbp => state.rbp = *value,
            }
        }
        self.vcpu.set_sregs(&sregs).unwrap();
        self.vcpu.set_regs(&state).unwrap();
        let _ = self.vcpu.set_vcpu_events(&self.clean_events);
    }

    /// Identity for the 2 MiB, and a second page table in the page that most cases forbid.
    fn write_tables(&mut self) {
        const FLAGS: u64 = 3;
        let f = super::F;
        self.write64(PML4, PDPT | FLAGS);
        self.write64(PDPT, PD | FLAGS);
        self.write64(PD, PT | FLAGS);
        self.write64(PD + 8, f | FLAGS);
        for page in 0..512 {
            self.write64(PT + 8 * page, page << 12 | FLAGS);
        }
        self.write64(PD + 16, DEVICE | FLAGS | 0x80);
        self.write64(f, super::DATA | FLAGS);
        self.write64(f + 8, super::G | FLAGS);
        for (number, word) in [HANDLER, 8, 2, STACK, 0x10].into_iter().enumerate() {
            self.write64(f + 0x18 + 8 * number as u64, word);
        }
        self.write(super::G, &[0xf4]);
        self.write(DEVICE, &[0xf4]);
        self.write64(GDT + 8, 0x00af_9a00_0000_ffff);
        self.write64(GDT + 16, 0x00cf_9200_0000_ffff);
        for vector in 0..0x42 {
            let ist = u64::from(vector == 0x41) << 32;
            self.write64(IDT + 16 * vector, (HANDLER & 0xffff) | 8 << 16 | 0x8e00 << 32 | ist | HANDLER >> 16 << 48);
            self.write64(IDT + 16 * vector + 8, 0);
        }
        self.write(TSS + 0x24, &(IST + 0x1000).to_le_bytes());
    }

    fn real_mode(&mut self, sregs: &mut kvm_sregs) {
        let base = |segment: &mut kvm_segment, base: u64| {
            segment.base = base;
            segment.selector = u16::try_from(base >> 4).unwrap();
        };
        base(&mut sregs.cs, CODE);
        base(&mut sregs.ds, super::F);
        base(&mut sregs.es, super::F);
        base(&mut sregs.ss, super::F);
        sregs.idt.base = 0;
        sregs.idt.limit = 0x3ff;
        self.write(0x40 * 4, &[0x00, 0x00, 0x00, 0x11]);
    }

    /// Runs to HLT with `missing` unmapped until the guest has been caught there.
    pub(crate) fn run(&mut self, missing: &[u64]) -> Result<Outcome, String> {
        for page in missing {
            self.allow(*page, false);
        }
        let mut missing = missing.to_vec();
        let end = self.run_inner(&mut missing);
        for page in missing {
            self.allow(page, true);
        }
        let (reported, how) = end?;
        if self.host.is_empty() && !reported.is_empty() {
            self.host = how;
        }
        let mut memory = vec![0; WHOLE];
        Own(self.own).read(0, &mut memory);
        Ok(Outcome { reported, regs: self.vcpu.get_regs().unwrap(), memory, how })
    }

    fn run_inner(&mut self, missing: &mut Vec<u64>) -> Result<(Vec<Access>, &'static str), String> {
        let mut reported = Vec::new();
        let mut how = "nothing";
        for _ in 0..200 {
            // SAFETY: a timer of this process, whose signal has a handler (`Guest::new`) and ends a hanging KVM_RUN.
            unsafe { libc::alarm(5) };
            let exit = match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return Ok((reported, how)),
                Ok(exit) => format!("{exit:?}"),
                Err(errno) if errno.errno() == libc::EFAULT => "EFAULT".into(),
                Err(errno) if errno.errno() == libc::EINTR => return Err("does not end".into()),
                Err(errno) => return Err(format!("KVM_RUN: {errno}")),
            };
            // SAFETY: the mapping that the vCPU object keeps until it is dropped; this is the only thread.
            let run = unsafe { RunArea::new(NonNull::from(self.vcpu.get_kvm_run()).cast()) };
            // SAFETY: the descriptor of `self.vcpu`, which outlives every use below.
            let fd = unsafe { BorrowedFd::borrow_raw(self.vcpu.as_raw_fd()) };
            let mmio = run.mmio().filter(|mmio| exit != "EFAULT" && missing.contains(&(mmio.gpa & !0xfff)));
            match mmio {
                Some(mmio) if mmio.is_write => {
                    how = "MMIO";
                    self.resolve_write(fd, run, missing, &mut reported)?;
                }
                Some(mmio) => {
                    how = "MMIO";
                    vcpu::put_back_read(fd, run).map_err(|errno| format!("put_back_read: {errno}"))?;
                    self.resolve(mmio.access(), missing, &mut reported);
                }
                None if exit == "EFAULT" || run.is_emulation_failure() => {
                    how = if exit == "EFAULT" { "EFAULT" } else { "internal error" };
                    let access = self.locate(fd, missing, how)?.ok_or(format!("{exit}: nothing located"))?;
                    self.resolve(access, missing, &mut reported);
                }
                None => return Err(exit),
            }
        }
        Err("does not end".into())
    }

    fn locate(&mut self, fd: BorrowedFd<'_>, missing: &[u64], how: &str) -> Result<Option<Access>, String> {
        let own = Own(self.own);
        let once = || vcpu::locate(fd, &own, &mut |gfn, _| missing.contains(&gfn.gpa()));
        let found = if how == "EFAULT" {
            once()
        } else {
            vcpu::locate_failed_emulation(fd, &own, &mut |gfn, _| missing.contains(&gfn.gpa()))
        };
        if self.cost.is_none() && how == "EFAULT" {
            let start = Instant::now();
            (0..1000).for_each(|_| {
                std::hint::black_box(once()).ok();
            });
            self.cost = Some(format!("locate: {:?} each, system calls included", start.elapsed() / 1000));
        }
        found.map_err(|errno| format!("locate: {errno}"))
    }

    fn resolve(&mut self, access: Access, missing: &mut Vec<u64>, reported: &mut Vec<Access>) {
        let page = access.gpa & !0xfff;
        self.allow(page, true);
        missing.retain(|other| *other != page);
        reported.push(access);
    }

    fn resolve_write(
        &mut self,
        fd: BorrowedFd<'_>,
        run: RunArea,
        missing: &mut Vec<u64>,
        reported: &mut Vec<Access>,
    ) -> Result<(), String> {
        let mut pending = vcpu::collect_write(fd, run).map_err(|errno| format!("collect_write: {errno}"))?;
        let mut next = pending.access();
        while let Some(access) = next {
            self.resolve(access, missing, reported);
            next = pending.carry_out(|gpa, bytes| {
                let resolved = !missing.contains(&(gpa & !0xfff));
                if resolved {
                    self.write(gpa, bytes);
                }
                resolved
            });
        }
        Ok(())
    }

    pub(crate) fn report_cost(&self) {
        if let Some(cost) = &self.cost {
            println!("{cost}");
        }
    }
}

fn long_mode(sregs: &mut kvm_sregs) {
    let code =
        kvm_segment { limit: u32::MAX, selector: 8, type_: 11, present: 1, s: 1, l: 1, g: 1, ..Default::default() };
    let data = kvm_segment { selector: 16, type_: 3, l: 0, db: 1, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { base: TSS, limit: 0x67, selector: 0x18, type_: 11, present: 1, ..Default::default() };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x2f);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 0x42 * 16 - 1);
    sregs.cr0 = 0x8001_0033;
    sregs.cr3 = PML4;
    sregs.cr4 = 0x20 | 3 << 9 | 1 << 18;
    sregs.efer = 0xd00;
}
