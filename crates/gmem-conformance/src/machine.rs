//! A VM and its vCPUs as every mode of this program needs them: the agent's memory at gpa 0, long mode, a run page.

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::agent::{self, AGENT_LEN, Stub};
use crate::sys::{self, Cpuid, EnableCap, Errno, Region2, RunPage, Sys};

/// The slot id of the agent's memory; the operations use smaller ones.
const AGENT_SLOT: u32 = 100;

/// `/dev/kvm`.
#[derive(Debug)]
pub(crate) struct Kvm {
    pub(crate) fd: i32,
    run_len: usize,
    hypercall: Stub,
}

impl Kvm {
    /// Opens the device.
    pub(crate) fn open() -> Sys<Self> {
        let fd = sys::open("/dev/kvm", libc::O_RDWR)?;
        let run_len = usize::try_from(sys::ioctl_value(fd, sys::KVM_GET_VCPU_MMAP_SIZE, 0)?).unwrap_or(0);
        let amd = std::arch::x86_64::__cpuid(0).ecx != u32::from_le_bytes(*b"ntel");
        Ok(Self { fd, run_len, hypercall: if amd { Stub::Vmmcall } else { Stub::Vmcall } })
    }

    /// The hypercall instruction of this machine's vendor.
    pub(crate) fn hypercall_stub(&self) -> Stub {
        self.hypercall
    }

    /// KVM_CHECK_EXTENSION on the device.
    pub(crate) fn capability(&self, cap: u32) -> u64 {
        let value = sys::ioctl_value(self.fd, sys::KVM_CHECK_EXTENSION, u64::from(cap)).unwrap_or(0);
        u64::try_from(value).unwrap_or(0)
    }

    /// SW_PROTECTED where it is offered, else the default type.
    pub(crate) fn best_type(&self) -> u64 {
        let types = self.capability(sys::KVM_CAP_VM_TYPES);
        if types & (1 << sys::VM_TYPE_SW_PROTECTED) != 0 { sys::VM_TYPE_SW_PROTECTED } else { sys::VM_TYPE_DEFAULT }
    }
}

impl Drop for Kvm {
    fn drop(&mut self) {
        let _ = sys::close(self.fd);
    }
}

/// An anonymous or shared mapping of this program, released when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) at: usize,
    pub(crate) len: usize,
    slack: (usize, usize),
}

impl Mapping {
    /// Maps `len` bytes at a multiple of 2 MiB.
    pub(crate) fn new(len: usize, prot: i32, flags: i32, fd: i32) -> Sys<Self> {
        const ALIGN: usize = 2 << 20;
        let slack = len + ALIGN;
        let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the first mapping is not a fixed one, the second lies inside it.
        let (whole, at) = unsafe {
            let whole = sys::mmap(0, slack, libc::PROT_NONE, none, -1, 0)?;
            let at = whole.next_multiple_of(ALIGN);
            (whole, sys::mmap(at, len, prot, flags | libc::MAP_FIXED, fd, 0)?)
        };
        Ok(Self { at, len, slack: (whole, slack) })
    }

    /// The bytes of a mapping that is readable; the guest may change them at any time, so they are copied out.
    pub(crate) fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.len);
        let mut bytes = vec![0; len];
        // SAFETY: inside the mapping, which the callers only read where it is readable.
        unsafe { std::ptr::copy_nonoverlapping((self.at + offset) as *const u8, bytes.as_mut_ptr(), len) };
        bytes
    }

    /// Sets bytes of a mapping that is writable.
    pub(crate) fn fill(&self, offset: usize, len: usize, value: u8) {
        assert!(offset + len <= self.len);
        // SAFETY: inside the mapping, which the callers only write where it is writable.
        unsafe { std::ptr::write_bytes((self.at + offset) as *mut u8, value, len) };
    }

    /// The quadword at an aligned offset, read at once.
    pub(crate) fn word(&self, offset: usize) -> u64 {
        assert!(offset + 8 <= self.len && offset.is_multiple_of(8));
        // SAFETY: inside the mapping and aligned.
        unsafe { ((self.at + offset) as *const u64).read_volatile() }
    }

    /// `madvise` of a part.
    pub(crate) fn advise(&self, offset: usize, len: usize, advice: i32) -> Sys<i64> {
        assert!(offset + len <= self.len);
        // SAFETY: inside the mapping; the contents are test data.
        sys::check(unsafe { libc::madvise((self.at + offset) as *mut libc::c_void, len, advice) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own.
        unsafe { sys::munmap(self.slack.0, self.slack.1) }
    }
}

/// A VM with the agent in its first pages.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) fd: i32,
    _agent: Mapping,
}

impl Machine {
    /// Creates a VM; an errno is that of KVM_CREATE_VM.
    pub(crate) fn new(kvm: &Kvm, kind: u64) -> Sys<Self> {
        let fd = sys::fd_of(sys::ioctl_value(kvm.fd, sys::KVM_CREATE_VM, kind)?);
        let len = usize::try_from(AGENT_LEN).unwrap_or(0);
        let agent = Mapping::new(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
        // SAFETY: fresh memory that nothing else refers to yet.
        agent::install(unsafe { std::slice::from_raw_parts_mut(agent.at as *mut u8, len) });
        let mut region = Region2 { slot: AGENT_SLOT, size: AGENT_LEN, hva: agent.at as u64, ..Default::default() };
        sys::ioctl(fd, sys::KVM_SET_USER_MEMORY_REGION, &mut region)?;
        Ok(Self { fd, _agent: agent })
    }

    /// KVM_ENABLE_CAP of the exit for KVM_HC_MAP_GPA_RANGE and whatever else `bits` say.
    pub(crate) fn enable_hypercalls(fd: i32, bits: u64) -> Sys<i64> {
        let mut cap = EnableCap { cap: sys::KVM_CAP_EXIT_HYPERCALL, args: [bits, 0, 0, 0], ..Default::default() };
        sys::ioctl(fd, sys::KVM_ENABLE_CAP, &mut cap)
    }

    /// Closes the descriptor but keeps the memory.
    pub(crate) fn close_fd(&mut self) -> Sys<i64> {
        sys::close(std::mem::replace(&mut self.fd, -1))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.fd != -1 {
            let _ = self.close_fd();
        }
    }
}

/// Why KVM_RUN returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The stub finished and wrote to this port.
    Port(u16),
    Mmio {
        write: bool,
        gpa: u64,
        len: u32,
        data: [u8; 8],
    },
    Hypercall {
        nr: u64,
        args: [u64; 3],
        ret: u64,
    },
    /// EFAULT or EHWPOISON with a filled exit structure.
    MemoryFault {
        errno: Errno,
        flags: u64,
        gpa: u64,
        size: u64,
    },
    /// KVM_EXIT_INTERNAL_ERROR with its suberror.
    Internal(u32),
    /// Another exit reason.
    Other(u32),
    /// An errno that says nothing more; the exit reason is shown because EFAULT leaves it at 0.
    Failed(Errno, u32),
}

/// A vCPU in long mode.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) fd: i32,
    pub(crate) run: RunPage,
}

impl Vcpu {
    /// Creates a vCPU of a VM and puts it into long mode.
    pub(crate) fn new(kvm: &Kvm, vm: i32, id: u64) -> Sys<Self> {
        let fd = sys::fd_of(sys::ioctl_value(vm, sys::KVM_CREATE_VCPU, id)?);
        let vcpu = Self { fd, run: RunPage::map(fd, kvm.run_len)? };
        let mut cpuid = Box::new(Cpuid { count: 256, padding: 0, entries: [Default::default(); 256] });
        sys::ioctl(kvm.fd, sys::KVM_GET_SUPPORTED_CPUID, &mut *cpuid)?;
        mask(&mut cpuid);
        sys::ioctl(fd, sys::KVM_SET_CPUID2, &mut *cpuid)?;
        vcpu.long_mode()?;
        Ok(vcpu)
    }

    /// Sets the system registers, as at the beginning.
    pub(crate) fn long_mode(&self) -> Sys<i64> {
        let mut sregs = kvm_sregs::default();
        sys::ioctl(self.fd, sys::KVM_GET_SREGS, &mut sregs)?;
        agent::long_mode(&mut sregs);
        sys::ioctl(self.fd, sys::KVM_SET_SREGS, &mut sregs)
    }

    pub(crate) fn set_regs(&self, regs: &kvm_regs) -> Sys<i64> {
        sys::ioctl(self.fd, sys::KVM_SET_REGS, &mut regs.clone())
    }

    pub(crate) fn regs(&self) -> Sys<kvm_regs> {
        let mut regs = kvm_regs::default();
        sys::ioctl(self.fd, sys::KVM_GET_REGS, &mut regs)?;
        Ok(regs)
    }

    /// One KVM_RUN; EINTR and EAGAIN are tried again, a thousand times.
    pub(crate) fn run(&self) -> Exit {
        for _ in 0..1000 {
            match sys::ioctl_value(self.fd, sys::KVM_RUN, 0) {
                Err(Errno(libc::EINTR | libc::EAGAIN)) => {}
                Err(errno) => return self.failure(errno),
                Ok(_) => return self.exit(),
            }
        }
        Exit::Failed(Errno(libc::EAGAIN), self.reason())
    }

    fn reason(&self) -> u32 {
        self.run.get(RunPage::EXIT_REASON)
    }

    fn failure(&self, errno: Errno) -> Exit {
        let (reason, run) = (self.reason(), &self.run);
        match errno.0 {
            libc::EFAULT | libc::EHWPOISON if reason == kvm_bindings::KVM_EXIT_MEMORY_FAULT => {
                Exit::MemoryFault { errno, flags: run.body(0), gpa: run.body(8), size: run.body(16) }
            }
            libc::EFAULT | libc::EHWPOISON => Exit::Failed(errno, reason),
            _ => Exit::Failed(errno, 0),
        }
    }

    fn exit(&self) -> Exit {
        let run = &self.run;
        match self.reason() {
            kvm_bindings::KVM_EXIT_IO => Exit::Port(run.body(2)),
            kvm_bindings::KVM_EXIT_MMIO => {
                Exit::Mmio { gpa: run.body(0), data: run.body(8), len: run.body(16), write: run.body::<u8>(20) != 0 }
            }
            kvm_bindings::KVM_EXIT_HYPERCALL => {
                Exit::Hypercall { nr: run.body(0), args: [run.body(8), run.body(16), run.body(24)], ret: run.body(56) }
            }
            kvm_bindings::KVM_EXIT_INTERNAL_ERROR => Exit::Internal(run.body(0)),
            reason => Exit::Other(reason),
        }
    }

    /// Supplies the data of an MMIO read.
    pub(crate) fn answer_mmio(&self, data: [u8; 8]) {
        self.run.put(RunPage::BODY + 8, data);
    }

    /// Supplies the result of a hypercall.
    pub(crate) fn answer_hypercall(&self, ret: u64) {
        self.run.put(RunPage::BODY + 56, ret);
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        let _ = sys::close(self.fd);
    }
}

/// Hides five-level paging, which some hosts report and then refuse.
fn mask(cpuid: &mut Cpuid) {
    let count = usize::try_from(cpuid.count).unwrap_or(0).min(cpuid.entries.len());
    for entry in &mut cpuid.entries[..count] {
        match (entry.function, entry.index) {
            (7, 0) => entry.ecx &= !(1 << 16),
            (0x8000_0008, _) => entry.eax = (entry.eax & !0xff00) | 48 << 8,
            _ => {}
        }
    }
}
