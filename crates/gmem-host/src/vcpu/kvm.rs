//! The part of KVM's x86 vCPU calls that this module uses (`linux/kvm.h`).
//!
//! Every system call goes through rustix's own `syscall` instruction, so that it is issued from this library's text and
//! not from libc's: a client may filter system calls by instruction pointer.

use core::ffi::c_void;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::ioctl::{Getter, Ioctl, IoctlOutput, NoArg, Opcode, Setter, ioctl, opcode};

use super::layout::{Events, Fpu, Regs, Sregs};
use super::state::{Component, Source};

/// `struct kvm_xcrs`: sixteen of (number, reserved, value) between a count and padding.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Xcrs {
    nr_xcrs: u32,
    flags: u32,
    xcrs: [(u32, u32, u64); 16],
    padding: [u64; 16],
}

/// `struct kvm_xsave` without its flexible tail.
type Xsave = [u32; 1024];

const _: () = assert!(size_of::<Xcrs>() == 392 && size_of::<Xsave>() == 4096);

const KVMIO: u8 = 0xae;
const KVM_RUN: Opcode = opcode::none(KVMIO, 0x80);
const KVM_GET_REGS: Opcode = opcode::read::<Regs>(KVMIO, 0x81);
const KVM_SET_REGS: Opcode = opcode::write::<Regs>(KVMIO, 0x82);
const KVM_GET_SREGS: Opcode = opcode::read::<Sregs>(KVMIO, 0x83);
const KVM_SET_SREGS: Opcode = opcode::write::<Sregs>(KVMIO, 0x84);
const KVM_GET_FPU: Opcode = opcode::read::<Fpu>(KVMIO, 0x8c);
const KVM_SET_FPU: Opcode = opcode::write::<Fpu>(KVMIO, 0x8d);
const KVM_GET_VCPU_EVENTS: Opcode = opcode::read::<Events>(KVMIO, 0x9f);
const KVM_SET_VCPU_EVENTS: Opcode = opcode::write::<Events>(KVMIO, 0xa0);
const KVM_GET_XSAVE: Opcode = opcode::read::<Xsave>(KVMIO, 0xa4);
const KVM_SET_XSAVE: Opcode = opcode::write::<Xsave>(KVMIO, 0xa5);
const KVM_GET_XCRS: Opcode = opcode::read::<Xcrs>(KVMIO, 0xa6);
const KVM_GET_XSAVE2: Opcode = opcode::read::<Xsave>(KVMIO, 0xcf);

/// A vCPU descriptor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vcpu<'a>(pub(super) BorrowedFd<'a>);

macro_rules! get {
    ($self:ident, $number:ident, $type:ty) => {
        // SAFETY: the number was computed from the type that the kernel fills (sizes asserted above), and rustix hands
        // over a buffer of exactly that type; any bytes are a valid value of it.
        unsafe { ioctl($self.0, Getter::<$number, $type>::new()) }
    };
}

macro_rules! set {
    ($self:ident, $number:ident, $type:ty, $value:expr) => {
        // SAFETY: the number was computed from the type that the kernel reads (sizes asserted above), and rustix passes
        // a reference to a value of that type.
        unsafe { ioctl($self.0, Setter::<$number, $type>::new($value)) }
    };
}

impl Vcpu<'_> {
    pub(super) fn set_regs(self, regs: Regs) -> Result<(), Errno> {
        set!(self, KVM_SET_REGS, Regs, regs)
    }

    pub(super) fn set_sregs(self, sregs: Sregs) -> Result<(), Errno> {
        set!(self, KVM_SET_SREGS, Sregs, sregs)
    }

    pub(super) fn set_events(self, events: Events) -> Result<(), Errno> {
        set!(self, KVM_SET_VCPU_EVENTS, Events, events)
    }

    pub(super) fn fpu(self) -> Result<Fpu, Errno> {
        get!(self, KVM_GET_FPU, Fpu)
    }

    pub(super) fn set_fpu(self, fpu: Fpu) -> Result<(), Errno> {
        set!(self, KVM_SET_FPU, Fpu, fpu)
    }

    /// Writes back what [`Source::xsave`] returned.
    pub(super) fn set_xsave(self, image: &mut [u64]) -> Result<(), Errno> {
        let op = Image { opcode: KVM_SET_XSAVE, image };
        // SAFETY: the kernel reads at most the size of its own image, which `xsave_bytes` bounds from above; the buffer
        // came from `Source::xsave`, which allocated that many.
        unsafe { ioctl(self.0, op) }
    }

    /// `KVM_RUN`: true when it returned with an exit, false when it was interrupted (EINTR).
    pub(super) fn run(self) -> Result<bool, Errno> {
        // SAFETY: `KVM_RUN` takes no argument; what it writes is the `kvm_run` mapping, whose owner called us.
        match unsafe { ioctl(self.0, NoArg::<KVM_RUN>::new()) } {
            Ok(()) => Ok(true),
            Err(Errno::INTR) => Ok(false),
            Err(errno) => Err(errno),
        }
    }
}

impl Source for Vcpu<'_> {
    fn regs(&self) -> Result<Regs, Errno> {
        get!(self, KVM_GET_REGS, Regs)
    }

    fn sregs(&self) -> Result<Sregs, Errno> {
        get!(self, KVM_GET_SREGS, Sregs)
    }

    fn events(&self) -> Result<Events, Errno> {
        get!(self, KVM_GET_VCPU_EVENTS, Events)
    }

    fn xcr0(&self) -> Result<u64, Errno> {
        let xcrs: Xcrs = get!(self, KVM_GET_XCRS, Xcrs)?;
        Ok(xcrs.xcrs.iter().find(|(number, ..)| *number == 0).map_or(3, |(.., value)| *value))
    }

    /// `KVM_GET_XSAVE2`, or the older call with 4096 bytes where that is unknown.
    fn xsave(&self) -> Result<Vec<u64>, Errno> {
        let mut image = vec![0; xsave_bytes().div_ceil(8)];
        for opcode in [KVM_GET_XSAVE2, KVM_GET_XSAVE] {
            let op = Image { opcode, image: &mut image };
            // SAFETY: the kernel writes its own image, of 4096 bytes or the size of all user features if that is more;
            // `xsave_bytes` bounds both from above.
            match unsafe { ioctl(self.0, op) } {
                Ok(()) => return Ok(image),
                Err(errno) if opcode == KVM_GET_XSAVE => return Err(errno),
                Err(_) => {}
            }
        }
        Err(Errno::NOTTY)
    }

    fn component(&self, number: u32) -> Component {
        let leaf = core::arch::x86_64::__cpuid_count(0xd, number);
        Component { size: leaf.eax, offset: leaf.ebx, aligned: leaf.ecx & 2 != 0 }
    }
}

/// Bytes that an XSAVE image of this machine can have: CPUID.(0DH,0):ECX, and never less than `struct kvm_xsave`.
fn xsave_bytes() -> usize {
    // The leaf does not exist on processors without XSAVE; asking for it there answers with another leaf's numbers.
    let leaves = core::arch::x86_64::__cpuid(0).eax;
    let bytes = if leaves >= 0xd { core::arch::x86_64::__cpuid_count(0xd, 0).ecx } else { 0 };
    usize::try_from(bytes).unwrap_or(0).max(size_of::<Xsave>())
}

/// An ioctl on an XSAVE image, which is longer than the type in the ioctl's number says.
struct Image<'a> {
    opcode: Opcode,
    image: &'a mut [u64],
}

// SAFETY: the pointer leads to the whole image and there is no output to extract; that the image is long enough is for
// the two callers in this file to say.
unsafe impl Ioctl for Image<'_> {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.image.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}
