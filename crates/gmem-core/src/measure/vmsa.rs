//! Reset state of a vCPU as it is measured: the save area of AMD64 APM volume 2, table B-4.

use super::ovmf::Ovmf;

/// Where the first vCPU starts.
pub const BSP_EIP: u32 = 0xffff_fff0;

/// Which VMM resets the vCPUs. They differ in what they leave in some registers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Vmm {
    /// QEMU.
    #[default]
    Qemu,
    /// Amazon EC2. Published calculators disagree on its state; this is that of PyPI's `sev-snp-measure`.
    Ec2,
    /// Google Compute Engine.
    Gce,
}

/// What distinguishes the vCPUs of a guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VcpuReset {
    /// CPUID Fn0000_0001_EAX, which is in RDX after a reset by QEMU.
    pub signature: u64,
    /// SEV_FEATURES.
    pub features: u64,
    /// Who resets.
    pub vmm: Vmm,
}

/// CPUID Fn0000_0001_EAX of a family, model and stepping (AMD publication 25481). Bits that do not fit are dropped.
#[must_use]
pub const fn signature(family: u32, model: u32, stepping: u32) -> u32 {
    let (low, high) = if family > 0xf { (0xf, (family - 0xf) & 0xff) } else { (family, 0) };
    high << 20 | (model >> 4 & 0xf) << 16 | low << 8 | (model & 0xf) << 4 | stepping & 0xf
}

/// QEMU's EPYC models and their signatures.
pub const VCPU_TYPES: [(&str, u32); 16] = [
    ("EPYC", signature(23, 1, 2)),
    ("EPYC-v1", signature(23, 1, 2)),
    ("EPYC-v2", signature(23, 1, 2)),
    ("EPYC-IBPB", signature(23, 1, 2)),
    ("EPYC-v3", signature(23, 1, 2)),
    ("EPYC-v4", signature(23, 1, 2)),
    ("EPYC-Rome", signature(23, 49, 0)),
    ("EPYC-Rome-v1", signature(23, 49, 0)),
    ("EPYC-Rome-v2", signature(23, 49, 0)),
    ("EPYC-Rome-v3", signature(23, 49, 0)),
    ("EPYC-Milan", signature(25, 1, 1)),
    ("EPYC-Milan-v1", signature(25, 1, 1)),
    ("EPYC-Milan-v2", signature(25, 1, 1)),
    ("EPYC-Genoa", signature(25, 17, 0)),
    ("EPYC-Genoa-v1", signature(25, 17, 0)),
    ("EPYC-Turin", signature(26, 0, 0)),
];

/// A segment register: selector, attributes, limit, base.
#[derive(Clone, Copy)]
struct Segment(u16, u16, u32, u64);

impl Segment {
    const fn data(attributes: u16) -> Self {
        Self(0, attributes, 0xffff, 0)
    }
}

/// Offsets of the registers that a reset sets.
mod offset {
    pub(super) const SEGMENTS: usize = 0;
    pub(super) const EFER: usize = 0xd0;
    pub(super) const CR4: usize = 0x148;
    pub(super) const CR0: usize = 0x158;
    pub(super) const DR7: usize = 0x160;
    pub(super) const DR6: usize = 0x168;
    pub(super) const RFLAGS: usize = 0x170;
    pub(super) const RIP: usize = 0x178;
    pub(super) const G_PAT: usize = 0x268;
    pub(super) const RDX: usize = 0x310;
    pub(super) const SEV_FEATURES: usize = 0x3b0;
    pub(super) const XCR0: usize = 0x3e8;
    pub(super) const MXCSR: usize = 0x408;
    pub(super) const X87_FCW: usize = 0x410;
}

/// A page under construction. Offsets are constants of this module, so every write fits.
struct Page([u8; 4096]);

impl Page {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(to) = self.0.get_mut(at..at.saturating_add(bytes.len())) {
            to.copy_from_slice(bytes);
        }
    }

    fn word(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    /// ES, CS, SS, DS, FS, GS, GDTR, LDTR, IDTR, TR.
    fn segments(&mut self, segments: [Segment; 10]) {
        let mut at = offset::SEGMENTS;
        for Segment(selector, attributes, limit, base) in segments {
            self.put(at, &selector.to_le_bytes());
            self.put(at + 2, &attributes.to_le_bytes());
            self.put(at + 4, &limit.to_le_bytes());
            self.word(at + 8, base);
            at += 16;
        }
    }

    /// What every reset agrees on. EFER.SVME and CR4.MCE are set by KVM.
    fn common(segments: [Segment; 10], cr0: u64, rip: u64, features: u64) -> Self {
        let mut page = Self([0; 4096]);
        page.segments(segments);
        page.word(offset::EFER, 0x1000);
        page.word(offset::CR4, 0x40);
        page.word(offset::CR0, cr0);
        page.word(offset::DR7, 0x400);
        page.word(offset::DR6, 0xffff_0ff0);
        page.word(offset::RFLAGS, 2);
        page.word(offset::RIP, rip);
        page.word(offset::SEV_FEATURES, features);
        page.word(offset::XCR0, 1);
        page
    }
}

/// Power-on value of the page attribute table.
const RESET_PAT: u64 = 0x0007_0406_0007_0406;

/// Registers that depend on the VMM: attributes of CS, SS and TR, then G_PAT, RDX, MXCSR, FCW.
struct Leftovers {
    attributes: [u16; 3],
    pat: u64,
    rdx: u64,
    mxcsr: u32,
    fcw: u16,
}

impl Leftovers {
    const fn of(vcpu: VcpuReset, eip: u32) -> Self {
        let ec2_cs = if eip == BSP_EIP { 0x9a } else { 0x9b };
        match vcpu.vmm {
            Vmm::Qemu => {
                Self { attributes: [0x9b, 0x93, 0x8b], pat: RESET_PAT, rdx: vcpu.signature, mxcsr: 0x1f80, fcw: 0x37f }
            }
            Vmm::Ec2 => Self { attributes: [ec2_cs, 0x92, 0x83], pat: RESET_PAT, rdx: 0x600, mxcsr: 0, fcw: 0 },
            Vmm::Gce => Self { attributes: [0x9b, 0x93, 0x8b], pat: 0x0007_0106, rdx: 0x600, mxcsr: 0, fcw: 0 },
        }
    }
}

/// The save area of a vCPU that starts at `eip`.
#[must_use]
pub fn reset_page(vcpu: VcpuReset, eip: u32) -> [u8; 4096] {
    let left = Leftovers::of(vcpu, eip);
    let [cs, ss, tr] = left.attributes;
    let code = Segment(0xf000, cs, 0xffff, u64::from(eip & 0xffff_0000));
    let (data, table) = (Segment::data(0x93), Segment::data(0));
    let segments =
        [data, code, Segment::data(ss), data, data, data, table, Segment::data(0x82), table, Segment::data(tr)];
    let mut page = Page::common(segments, 0x10, u64::from(eip & 0xffff), vcpu.features);
    page.word(offset::G_PAT, left.pat);
    page.word(offset::RDX, left.rdx);
    page.put(offset::MXCSR, &left.mxcsr.to_le_bytes());
    page.put(offset::X87_FCW, &left.fcw.to_le_bytes());
    page.0
}

/// The save area of every vCPU of a guest whose first code is an SVSM: flat 32-bit protected mode.
#[must_use]
pub fn svsm_page(signature: u64, entry: u64) -> [u8; 4096] {
    let flat = Segment(0x10, 0xc93, 0xffff_ffff, 0);
    let code = Segment(8, 0xc9b, 0xffff_ffff, 0);
    let table = Segment::data(0);
    let (gs, ldtr, tr) = (Segment::data(0x93), Segment::data(0x82), Segment::data(0x8b));
    let mut page = Page::common([flat, code, flat, flat, flat, gs, table, ldtr, table, tr], 0x11, entry, 1);
    page.word(offset::G_PAT, RESET_PAT);
    page.word(offset::RDX, signature);
    page.put(offset::MXCSR, &0x1f80u32.to_le_bytes());
    page.0
}

/// The save areas of a guest: the first vCPU's and that of all others.
///
/// # Errors
/// [`super::ovmf::OvmfError::NoResetBlock`] when the image names no address for the others, even if there are none.
pub fn reset_pages(vcpu: VcpuReset, ovmf: &Ovmf<'_>) -> Result<[[u8; 4096]; 2], super::ovmf::OvmfError> {
    Ok([reset_page(vcpu, BSP_EIP), reset_page(vcpu, ovmf.reset_eip()?)])
}
