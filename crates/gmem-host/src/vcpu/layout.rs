//! Layouts of a vCPU's state as KVM passes it (`arch/x86/include/uapi/asm/kvm.h`).

/// `struct kvm_regs`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Regs {
    pub(super) rax: u64,
    pub(super) rbx: u64,
    pub(super) rcx: u64,
    pub(super) rdx: u64,
    pub(super) rsi: u64,
    pub(super) rdi: u64,
    pub(super) rsp: u64,
    pub(super) rbp: u64,
    pub(super) r8_to_r15: [u64; 8],
    pub(super) rip: u64,
    pub(super) rflags: u64,
}

/// `struct kvm_segment`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Segment {
    pub(super) base: u64,
    pub(super) limit: u32,
    pub(super) selector: u16,
    pub(super) type_: u8,
    pub(super) present: u8,
    pub(super) dpl: u8,
    pub(super) db: u8,
    pub(super) s: u8,
    pub(super) l: u8,
    pub(super) g: u8,
    pub(super) avl: u8,
    pub(super) unusable: u8,
    pub(super) padding: u8,
}

/// `struct kvm_dtable`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Table {
    pub(super) base: u64,
    pub(super) limit: u16,
    pub(super) padding: [u16; 3],
}

/// `struct kvm_sregs`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Sregs {
    pub(super) cs: Segment,
    pub(super) ds: Segment,
    pub(super) es: Segment,
    pub(super) fs: Segment,
    pub(super) gs: Segment,
    pub(super) ss: Segment,
    pub(super) tr: Segment,
    pub(super) ldt: Segment,
    pub(super) gdt: Table,
    pub(super) idt: Table,
    pub(super) cr0: u64,
    pub(super) cr2: u64,
    pub(super) cr3: u64,
    pub(super) cr4: u64,
    pub(super) cr8: u64,
    pub(super) efer: u64,
    pub(super) apic_base: u64,
    pub(super) interrupt_bitmap: [u64; 4],
}

/// `struct kvm_vcpu_events`. What follows the fields named here is carried along unread.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Events {
    pub(super) exception_injected: u8,
    pub(super) exception_nr: u8,
    pub(super) exception_has_error_code: u8,
    pub(super) exception_pending: u8,
    pub(super) exception_error_code: u32,
    pub(super) interrupt_injected: u8,
    pub(super) interrupt_nr: u8,
    pub(super) interrupt_soft: u8,
    pub(super) interrupt_shadow: u8,
    pub(super) nmi_injected: u8,
    pub(super) nmi_pending: u8,
    pub(super) nmi_masked: u8,
    pub(super) nmi_pad: u8,
    pub(super) rest: [u32; 10],
    pub(super) exception_payload: u64,
}

/// `struct kvm_fpu`: 416 bytes that nobody here looks into.
pub(super) type Fpu = [u64; 52];

const _: () = assert!(size_of::<Regs>() == 144 && size_of::<Sregs>() == 312);
const _: () = assert!(size_of::<Events>() == 64 && size_of::<Fpu>() == 416);
