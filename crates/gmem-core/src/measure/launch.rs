//! Launch digests of whole guests: which pages a VMM loads for an OVMF image, in which order.
//!
//! The order and the meaning of the options are those of PyPI's `sev-snp-measure` 0.0.13: firmware, sections of its SEV
//! metadata, vCPUs. Every step is reported, so that a person can see where two measurements part.

use super::ovmf::{BootHashes, Ovmf, OvmfError, Section, SectionKind};
use super::sev::SevDigest;
use super::snp::{PageInfo, PageType, SnpDigest, VMSA_GPA};
use super::vmsa::{VcpuReset, Vmm, reset_pages, svsm_page};

/// Why a guest has no measurement.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LaunchError {
    /// The image is malformed or lacks something.
    Ovmf(OvmfError),
    /// An image or a section does not consist of whole pages.
    Unaligned,
    /// A section of a kind that no VMM knows.
    UnknownSection(u32),
    /// A kernel is given and the image has no place for its hashes.
    NoHashTable,
    /// The hashes do not fit into the page that the image has for them.
    HashTableSize,
}

impl From<OvmfError> for LaunchError {
    fn from(error: OvmfError) -> Self {
        Self::Ovmf(error)
    }
}

impl core::fmt::Display for LaunchError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Ovmf(error) => return error.fmt(f),
            Self::Unaligned => "the image or one of its sections is not a number of 4 KiB pages",
            Self::UnknownSection(kind) => return write!(f, "the image has a section of unknown kind {kind:#x}"),
            Self::NoHashTable => "a kernel is given, but the image has no place for its hashes",
            Self::HashTableSize => "the kernel's hashes do not fit into the image's page for them",
        })
    }
}

impl core::error::Error for LaunchError {}

/// What a step of a launch loads.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Part {
    /// Firmware image.
    Firmware,
    /// SVSM image.
    Svsm,
    /// Section of the SEV metadata.
    Section(SectionKind),
    /// Hashes of kernel, initrd and command line.
    KernelHashes,
    /// Initial state of the vCPU with this number.
    Vmsa(u32),
    /// Page of an IGVM file.
    Directive,
    /// Page of a parameter area of an IGVM file.
    Parameters,
}

/// One page of an SNP launch and the digest after it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SnpStep {
    /// What the page is part of.
    pub part: Part,
    /// How it is loaded.
    pub page: PageInfo,
    /// Digest up to and including this page.
    pub digest: SnpDigest,
}

/// One load of an SEV or SEV-ES launch and the digest after it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SevStep {
    /// What is loaded.
    pub part: Part,
    /// Bytes.
    pub len: usize,
    /// Digest up to and including this load.
    pub digest: [u8; 32],
}

/// An SNP guest.
#[derive(Clone, Copy, Debug)]
pub struct SnpGuest<'a> {
    /// Firmware.
    pub ovmf: &'a Ovmf<'a>,
    /// Digest of the firmware alone, if it was computed before; the image's bytes are then not used.
    pub firmware_digest: Option<[u8; 48]>,
    /// What is booted directly.
    pub boot: Option<BootHashes>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Their reset state.
    pub vcpu: VcpuReset,
}

/// An SNP guest whose first code is an SVSM, below the firmware and its variables.
#[derive(Clone, Copy, Debug)]
pub struct SvsmGuest<'a> {
    /// Firmware.
    pub ovmf: &'a Ovmf<'a>,
    /// SVSM image, parsed at [`svsm_end`].
    pub svsm: &'a Ovmf<'a>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Their CPUID signature.
    pub signature: u64,
}

/// Guest physical address at which an SVSM image ends: below the firmware and its variables.
///
/// # Errors
/// [`OvmfError::Size`] when there is no room.
pub fn svsm_end(ovmf: &Ovmf<'_>, vars_size: u64) -> Result<u64, OvmfError> {
    ovmf.gpa().checked_sub(vars_size).ok_or(OvmfError::Size)
}

/// A digest that reports its steps.
pub(super) struct SnpRecorder<F> {
    digest: SnpDigest,
    report: F,
}

impl<F: FnMut(SnpStep)> SnpRecorder<F> {
    pub(super) const fn new(digest: SnpDigest, report: F) -> Self {
        Self { digest, report }
    }

    pub(super) const fn digest(&self) -> SnpDigest {
        self.digest
    }

    pub(super) fn page(&mut self, part: Part, page: PageInfo, contents: &[u8]) {
        self.digest.update(page, contents);
        (self.report)(SnpStep { part, page, digest: self.digest });
    }

    fn image(&mut self, part: Part, image: &Ovmf<'_>) -> Result<(), LaunchError> {
        let (pages, rest) = image.data().as_chunks::<4096>();
        if !rest.is_empty() {
            return Err(LaunchError::Unaligned);
        }
        for (page, gpa) in pages.iter().zip((image.gpa()..).step_by(4096)) {
            self.page(part, PageInfo::new(PageType::Normal, gpa), page);
        }
        Ok(())
    }

    fn range(&mut self, kind: PageType, section: Section) -> Result<(), LaunchError> {
        if !section.size.is_multiple_of(4096) {
            return Err(LaunchError::Unaligned);
        }
        let start = u64::from(section.gpa);
        for gpa in (start..start + u64::from(section.size)).step_by(4096) {
            self.page(Part::Section(section.kind), PageInfo::new(kind, gpa), &[]);
        }
        Ok(())
    }

    fn one(&mut self, kind: PageType, section: Section) {
        let page = PageInfo::new(kind, u64::from(section.gpa));
        self.page(Part::Section(section.kind), page, &[]);
    }

    fn section(
        &mut self,
        section: Section,
        vmm: Vmm,
        ovmf: &Ovmf<'_>,
        boot: Option<BootHashes>,
    ) -> Result<(), LaunchError> {
        match (section.kind, vmm, boot) {
            (SectionKind::Unknown(kind), ..) => Err(LaunchError::UnknownSection(kind)),
            (SectionKind::SecMem, Vmm::Gce, _) => self.range(PageType::Unmeasured, section),
            (SectionKind::SecMem | SectionKind::SvsmCaa, ..) => self.range(PageType::Zero, section),
            (SectionKind::Secrets, ..) => {
                self.one(PageType::Secrets, section);
                Ok(())
            }
            // EC2 loads the CPUID page after all other sections.
            (SectionKind::Cpuid, Vmm::Ec2, _) => Ok(()),
            (SectionKind::Cpuid, ..) => {
                self.one(PageType::Cpuid, section);
                Ok(())
            }
            (SectionKind::KernelHashes, _, None) => self.range(PageType::Zero, section),
            (SectionKind::KernelHashes, _, Some(boot)) => self.hashes(section, ovmf, boot),
        }
    }

    fn hashes(&mut self, section: Section, ovmf: &Ovmf<'_>, boot: BootHashes) -> Result<(), LaunchError> {
        let table = ovmf.hash_table_gpa().ok_or(LaunchError::NoHashTable)?;
        let offset = usize::try_from(table & 0xfff).unwrap_or(usize::MAX);
        let contents = boot.page(offset).filter(|_| section.size == 4096).ok_or(LaunchError::HashTableSize)?;
        let page = PageInfo::new(PageType::Normal, u64::from(section.gpa));
        self.page(Part::KernelHashes, page, &contents);
        Ok(())
    }

    fn sections(&mut self, ovmf: &Ovmf<'_>, vmm: Vmm, boot: Option<BootHashes>) -> Result<(), LaunchError> {
        for section in ovmf.sections() {
            self.section(*section, vmm, ovmf, boot)?;
        }
        let of = |kind| ovmf.sections().iter().filter(move |section| section.kind == kind);
        if vmm == Vmm::Ec2 {
            of(SectionKind::Cpuid).for_each(|section| self.one(PageType::Cpuid, *section));
        }
        if boot.is_some() && of(SectionKind::KernelHashes).next().is_none() {
            return Err(LaunchError::NoHashTable);
        }
        Ok(())
    }

    fn vmsa(&mut self, vcpu: u32, page: &[u8; 4096]) {
        self.page(Part::Vmsa(vcpu), PageInfo::new(PageType::Vmsa, VMSA_GPA), page);
    }
}

impl SnpGuest<'_> {
    /// The launch digest; `report` sees every page.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn measure(&self, report: impl FnMut(SnpStep)) -> Result<SnpDigest, LaunchError> {
        let digest = self.firmware_digest.map_or_else(SnpDigest::new, SnpDigest::resume);
        let mut recorder = SnpRecorder::new(digest, report);
        if self.firmware_digest.is_none() {
            recorder.image(Part::Firmware, self.ovmf)?;
        }
        recorder.sections(self.ovmf, self.vcpu.vmm, self.boot)?;
        let [first, others] = reset_pages(self.vcpu, self.ovmf)?;
        for vcpu in 0..self.vcpus {
            recorder.vmsa(vcpu, if vcpu == 0 { &first } else { &others });
        }
        Ok(recorder.digest)
    }
}

impl SvsmGuest<'_> {
    /// The launch digest; `report` sees every page.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn measure(&self, report: impl FnMut(SnpStep)) -> Result<SnpDigest, LaunchError> {
        let page = svsm_page(self.signature, self.svsm.svsm_entry()?);
        let mut recorder = SnpRecorder::new(SnpDigest::new(), report);
        recorder.image(Part::Firmware, self.ovmf)?;
        recorder.image(Part::Svsm, self.svsm)?;
        recorder.sections(self.svsm, Vmm::Qemu, None)?;
        (0..self.vcpus).for_each(|vcpu| recorder.vmsa(vcpu, &page));
        Ok(recorder.digest)
    }
}

/// The digest of a firmware image alone, from which [`SnpGuest::firmware_digest`] may continue.
///
/// # Errors
/// [`LaunchError::Unaligned`].
pub fn firmware_digest(ovmf: &Ovmf<'_>, report: impl FnMut(SnpStep)) -> Result<SnpDigest, LaunchError> {
    let mut recorder = SnpRecorder::new(SnpDigest::new(), report);
    recorder.image(Part::Firmware, ovmf)?;
    Ok(recorder.digest)
}

/// An SEV or SEV-ES guest.
#[derive(Clone, Copy, Debug)]
pub struct SevGuest<'a> {
    /// Firmware.
    pub ovmf: &'a Ovmf<'a>,
    /// What is booted directly.
    pub boot: Option<BootHashes>,
    /// Number and reset state of the vCPUs, which SEV-ES measures. Features are measured as given; KVM has none.
    pub vcpus: Option<(u32, VcpuReset)>,
}

impl SevGuest<'_> {
    /// The launch digest; `report` sees every load.
    ///
    /// # Errors
    /// [`LaunchError::NoHashTable`], [`OvmfError::NoResetBlock`].
    pub fn measure(&self, mut report: impl FnMut(SevStep)) -> Result<[u8; 32], LaunchError> {
        let mut digest = SevDigest::new();
        let mut load = |part, bytes: &[u8]| {
            digest.update(bytes);
            report(SevStep { part, len: bytes.len(), digest: digest.digest() });
        };
        load(Part::Firmware, self.ovmf.data());
        if let Some(boot) = self.boot {
            self.ovmf.hash_table_gpa().filter(|gpa| *gpa != 0).ok_or(LaunchError::NoHashTable)?;
            load(Part::KernelHashes, &boot.table());
        }
        if let Some((count, vcpu)) = self.vcpus {
            let [first, others] = reset_pages(vcpu, self.ovmf)?;
            (0..count).for_each(|vcpu| load(Part::Vmsa(vcpu), if vcpu == 0 { &first } else { &others }));
        }
        Ok(digest.digest())
    }
}
