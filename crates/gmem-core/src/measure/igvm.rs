//! Launch measurements of IGVM files (Independent Guest Virtual Machine, format versions 1 and 2).
//!
//! An IGVM file is a list of directives that a loader carries out in their order, so its measurement needs no knowledge
//! of the firmware inside. The layout is that of the `igvm_defs` crate, which is the format's specification. Directives apply to the
//! platforms whose bit their compatibility mask has:
//!
//! | directive | SEV-SNP | SEV, SEV-ES | TDX |
//! |---|---|---|---|
//! | page data | NORMAL, or UNMEASURED if flagged | its bytes; nothing if unmeasured | added, extended unless unmeasured |
//! | page data without bytes | NORMAL of zeros, or ZERO: see [`ZeroPages`] | zeros | zeros |
//! | secrets, CPUID pages | SECRETS, CPUID | refused, as QEMU does | as other pages |
//! | shared page data, error range | not measured | not measured | not measured |
//! | parameter insert | UNMEASURED pages of the whole area | not measured | added, not extended |
//! | VP context | VMSA at its own address | SEV-ES: its bytes; SEV: not measured | refused, TDX has none |
//!
//! Parameters, relocatable regions, policies and required memory add nothing. A file is measured as it stands, not relocated.
//! Other platforms of the format (VBS, CCA) are not measured. A file is untrusted bytes; nothing here panics on them.
//!
//! The order is the file's. KVM measures VMSAs last and at [`super::snp::VMSA_GPA`], whatever a file says: a file that was made
//! for it says the same.

use alloc::vec::Vec;

use super::launch::{Part, SevStep, SnpRecorder, SnpStep};
use super::sev::SevDigest;
use super::snp::{PageInfo, PageType, SnpDigest};
use super::tdx::{MeasuredPage, Mrtd};

const PAGE: usize = 4096;
const LARGE_PAGE: usize = 1 << 21;
/// The most memory that one file may ask to be measured, in bytes. Zero pages and parameter areas cost a file nothing.
const LARGEST: u64 = 1 << 32;
/// Marks a header that a loader may skip if it does not know it.
const OPTIONAL: u32 = 1 << 31;

const SUPPORTED_PLATFORM: u32 = 0x1;
const PARAMETER_AREA: u32 = 0x301;
const PAGE_DATA: u32 = 0x302;
const PARAMETER_INSERT: u32 = 0x303;
const VP_CONTEXT: u32 = 0x304;
const SNP_ID_BLOCK: u32 = 0x30b;
/// Headers that a measurement does not depend on: policies and relocation, parameters, required memory, error ranges.
const IMMATERIAL: [core::ops::RangeInclusive<u32>; 3] = [0x101..=0x106, 0x305..=0x30a, 0x30c..=0x313];

/// A platform that a file is measured for. The discriminant is the format's number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Platform {
    /// AMD SEV-SNP.
    SevSnp = 2,
    /// Intel TDX.
    Tdx = 3,
    /// AMD SEV.
    Sev = 4,
    /// AMD SEV-ES.
    SevEs = 5,
}

impl Platform {
    /// The name that the format gives it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SevSnp => "SEV_SNP",
            Self::Tdx => "TDX",
            Self::Sev => "SEV",
            Self::SevEs => "SEV_ES",
        }
    }
}

/// How a loader loads pages for which the file has no bytes. The format asks for data, QEMU uses SNP's own type.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum ZeroPages {
    /// As data that is zero.
    #[default]
    Data,
    /// As pages of the type ZERO, which SEV-SNP has.
    Native,
}

/// Why a file cannot be measured. Addresses are guest physical, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum IgvmError {
    /// The file does not begin with `IGVM`.
    Magic,
    /// The format's version is neither 1 nor 2.
    Version(u32),
    /// Pages of this many bytes, or a processor other than x86-64 (as its number).
    Machine(u32),
    /// The file is shorter or longer than its header says, or a reference points outside of it.
    Truncated,
    /// The header's checksum; the computed one comes second.
    Checksum(u32, u32),
    /// A header of a type that is not known, or of another length than its type has.
    Header(u32),
    /// The file is not made for the platform.
    NotFor(Platform),
    /// An address or a size that is not whole pages.
    Unaligned(u64),
    /// Page data of a type that the platform does not have.
    PageType(u16),
    /// A parameter area that was not declared, or was inserted before.
    ParameterArea(u32),
    /// The platform has no VP context.
    VpContext,
    /// The pages end beyond the address space, or are more than 4 GiB.
    TooLarge,
}

impl core::fmt::Display for IgvmError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Magic => f.write_str("not an IGVM file"),
            Self::Version(version) => write!(f, "IGVM format version {version}, not 1 or 2"),
            Self::Machine(what) => write!(f, "made for another machine (page size or architecture {what})"),
            Self::Truncated => f.write_str("the file is not as long as its header says, or points outside of itself"),
            Self::Checksum(found, computed) => {
                write!(f, "the header has checksum {found:#010x}, its bytes have {computed:#010x}")
            }
            Self::Header(kind) => write!(f, "header of type {kind:#x} is not known or has a wrong length"),
            Self::NotFor(platform) => write!(f, "the file is not made for {}", platform.name()),
            Self::Unaligned(value) => write!(f, "{value:#x} is not whole pages"),
            Self::PageType(kind) => write!(f, "page data of type {kind}, which this platform does not have"),
            Self::ParameterArea(index) => write!(f, "parameter area {index} is not there to be inserted"),
            Self::VpContext => f.write_str("a VP context for a platform that has none"),
            Self::TooLarge => f.write_str("the file wants more than 4 GiB measured, or pages beyond the address space"),
        }
    }
}

impl core::error::Error for IgvmError {}

/// A parsed file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Igvm<'a> {
    file: &'a [u8],
    headers: Vec<Header<'a>>,
}

/// A variable header: its type, without [`OPTIONAL`], and its contents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Header<'a> {
    kind: u32,
    body: &'a [u8],
}

impl Header<'_> {
    /// The structure's length, exactly; readers of fields need not look again.
    fn expect(&self, length: usize) -> Result<(), IgvmError> {
        if self.body.len() == length { Ok(()) } else { Err(IgvmError::Header(self.kind)) }
    }

    fn u16(&self, at: usize) -> u16 {
        field(self.body, at).map_or(0, u16::from_le_bytes)
    }

    fn u32(&self, at: usize) -> u32 {
        field(self.body, at).map_or(0, u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        field(self.body, at).map_or(0, u64::from_le_bytes)
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// What a directive makes a loader put into the guest before it starts.
enum Load<'a> {
    Pages { gpa: u64, size: usize, kind: PageKind, bytes: Option<&'a [u8]> },
    Parameters { gpa: u64, size: u64 },
    Vmsa { gpa: u64, vcpu: u16, page: &'a [u8; PAGE] },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum PageKind {
    Measured,
    Unmeasured,
    Secrets,
    Cpuid,
}

impl<'a> Igvm<'a> {
    /// Parses a file and verifies its checksum.
    ///
    /// # Errors
    /// The first seven of [`IgvmError`].
    pub fn parse(file: &'a [u8]) -> Result<Self, IgvmError> {
        let word = |index: usize| field(file, 4 * index).map(u32::from_le_bytes).ok_or(IgvmError::Truncated);
        if !file.starts_with(b"IGVM") {
            return Err(IgvmError::Magic);
        }
        let fixed = match word(1)? {
            1 => 24,
            2 => 32,
            version => return Err(IgvmError::Version(version)),
        };
        if fixed == 32 {
            machine(word(6)?, word(7)?)?;
        }
        let (start, size) = (usize_of(word(2)?), usize_of(word(3)?));
        let headers = start.checked_add(size).filter(|_| start >= fixed).and_then(|end| file.get(start..end));
        let headers = headers.filter(|_| usize_of(word(4).unwrap_or(0)) == file.len()).ok_or(IgvmError::Truncated)?;
        let computed = checksum(file.get(..fixed).unwrap_or_default(), headers);
        if word(5)? != computed {
            return Err(IgvmError::Checksum(word(5)?, computed));
        }
        Ok(Self { file, headers: variable_headers(headers)? })
    }

    /// The bit that directives for a platform have in their compatibility masks.
    ///
    /// # Errors
    /// [`IgvmError::NotFor`].
    fn mask(&self, platform: Platform) -> Result<u32, IgvmError> {
        let mut platforms = self.headers.iter().filter(|header| header.kind == SUPPORTED_PLATFORM);
        let found = platforms.find(|header| header.body.get(5) == Some(&(platform as u8)));
        found.map(|header| header.u32(0)).ok_or(IgvmError::NotFor(platform))
    }

    /// The launch digest that the file's own ID block for SEV-SNP promises, if it has one.
    #[must_use]
    pub fn id_block_digest(&self) -> Option<[u8; 48]> {
        let mask = self.mask(Platform::SevSnp).ok()?;
        let mut blocks = self.headers.iter().filter(|header| header.kind == SNP_ID_BLOCK && header.u32(0) & mask != 0);
        field(blocks.next()?.body, 8)
    }

    /// Bytes of guest memory that a loader fills for a platform, which is what measuring takes time for.
    ///
    /// # Errors
    /// [`IgvmError`].
    pub fn memory(&self, platform: Platform) -> Result<u64, IgvmError> {
        self.loads(platform)?.iter().try_fold(0, |sum: u64, load| Ok(sum.saturating_add(load.check()?)))
    }

    /// What a loader loads, in its order.
    fn loads(&self, platform: Platform) -> Result<Vec<Load<'a>>, IgvmError> {
        let mask = self.mask(platform)?;
        let (mut loads, mut areas, mut total) = (Vec::new(), Vec::new(), 0u64);
        for header in &self.headers {
            if header.kind == PARAMETER_AREA {
                header.expect(16)?;
                areas.push((header.u32(8), header.u64(0)));
                continue;
            }
            let Some(load) = self.load(header, mask, platform, &mut areas)? else { continue };
            total = total.saturating_add(load.check()?);
            if total > LARGEST {
                return Err(IgvmError::TooLarge);
            }
            loads.push(load);
        }
        Ok(loads)
    }

    fn load(
        &self,
        header: &Header<'_>,
        mask: u32,
        platform: Platform,
        areas: &mut Vec<(u32, u64)>,
    ) -> Result<Option<Load<'a>>, IgvmError> {
        let length = match header.kind {
            PAGE_DATA => 24,
            PARAMETER_INSERT => 16,
            VP_CONTEXT => 20,
            _ => return Ok(None),
        };
        header.expect(length)?;
        if header.u32(8) & mask == 0 {
            return Ok(None);
        }
        match header.kind {
            PAGE_DATA => self.page_data(header),
            PARAMETER_INSERT => parameter_insert(header, areas).map(Some),
            _ => self.vp_context(header, platform),
        }
    }

    fn page_data(&self, header: &Header<'_>) -> Result<Option<Load<'a>>, IgvmError> {
        let flags = header.u32(16);
        let size = if flags & 1 == 0 { PAGE } else { LARGE_PAGE };
        let kind = match header.u16(20) {
            0 if flags & 2 == 0 => PageKind::Measured,
            0 => PageKind::Unmeasured,
            1 => PageKind::Secrets,
            2 | 3 => PageKind::Cpuid,
            other => return Err(IgvmError::PageType(other)),
        };
        let bytes = match header.u32(12) {
            0 => None,
            offset => Some(self.bytes(offset, size)?),
        };
        let is_shared = flags & 4 != 0;
        Ok((!is_shared).then_some(Load::Pages { gpa: header.u64(0), size, kind, bytes }))
    }

    fn vp_context(&self, header: &Header<'_>, platform: Platform) -> Result<Option<Load<'a>>, IgvmError> {
        match platform {
            Platform::Tdx => Err(IgvmError::VpContext),
            Platform::Sev => Ok(None),
            Platform::SevSnp | Platform::SevEs => {
                let page = self.bytes(header.u32(12), PAGE)?.first_chunk().ok_or(IgvmError::Truncated)?;
                Ok(Some(Load::Vmsa { gpa: header.u64(0), vcpu: header.u16(16), page }))
            }
        }
    }

    fn bytes(&self, offset: u32, size: usize) -> Result<&'a [u8], IgvmError> {
        let start = usize_of(offset);
        start.checked_add(size).and_then(|end| self.file.get(start..end)).ok_or(IgvmError::Truncated)
    }

    /// SEV-SNP's launch digest; `report` sees every page.
    ///
    /// # Errors
    /// [`IgvmError`].
    pub fn measure_snp(&self, zero: ZeroPages, report: impl FnMut(SnpStep)) -> Result<SnpDigest, IgvmError> {
        let mut recorder = SnpRecorder::new(SnpDigest::new(), report);
        for load in self.loads(Platform::SevSnp)? {
            match load {
                Load::Pages { gpa, size, kind, bytes } => {
                    let kind = match (kind, bytes, zero) {
                        (PageKind::Measured, None, ZeroPages::Native) => PageType::Zero,
                        (PageKind::Measured, ..) => PageType::Normal,
                        (PageKind::Unmeasured, ..) => PageType::Unmeasured,
                        (PageKind::Secrets, ..) => PageType::Secrets,
                        (PageKind::Cpuid, ..) => PageType::Cpuid,
                    };
                    for (gpa, page) in pages(gpa, size, bytes) {
                        recorder.page(Part::Directive, PageInfo::new(kind, gpa), page);
                    }
                }
                Load::Parameters { gpa, size } => {
                    for gpa in addresses(gpa, size) {
                        recorder.page(Part::Parameters, PageInfo::new(PageType::Unmeasured, gpa), &[]);
                    }
                }
                Load::Vmsa { gpa, vcpu, page } => {
                    recorder.page(Part::Vmsa(vcpu.into()), PageInfo::new(PageType::Vmsa, gpa), page);
                }
            }
        }
        Ok(recorder.digest())
    }

    /// SEV's or SEV-ES's launch digest; `report` sees every load.
    ///
    /// # Errors
    /// [`IgvmError`].
    pub fn measure_sev(&self, es: bool, mut report: impl FnMut(SevStep)) -> Result<[u8; 32], IgvmError> {
        let mut digest = SevDigest::new();
        let mut load = |part, bytes: &[u8]| {
            digest.update(bytes);
            report(SevStep { part, len: bytes.len(), digest: digest.digest() });
        };
        for directive in self.loads(if es { Platform::SevEs } else { Platform::Sev })? {
            match directive {
                Load::Pages { kind: PageKind::Unmeasured, .. } | Load::Parameters { .. } => {}
                Load::Pages { kind: PageKind::Secrets, .. } => return Err(IgvmError::PageType(1)),
                Load::Pages { kind: PageKind::Cpuid, .. } => return Err(IgvmError::PageType(2)),
                Load::Pages { gpa, size, bytes, .. } => {
                    pages(gpa, size, bytes).for_each(|(_, page)| load(Part::Directive, page));
                }
                Load::Vmsa { vcpu, page, .. } => load(Part::Vmsa(vcpu.into()), page),
            }
        }
        Ok(digest.digest())
    }

    /// TDX's MRTD; `on_page` sees every page.
    ///
    /// # Errors
    /// [`IgvmError`].
    pub fn measure_tdx(&self, on_page: &mut dyn FnMut(MeasuredPage)) -> Result<[u8; 48], IgvmError> {
        let mut mrtd = Mrtd::new();
        for load in self.loads(Platform::Tdx)? {
            match load {
                Load::Pages { gpa, size, kind, bytes } => {
                    let is_measured = kind != PageKind::Unmeasured;
                    for (gpa, page) in pages(gpa, size, bytes) {
                        mrtd.page_and_report(gpa, is_measured.then_some(page), on_page);
                    }
                }
                Load::Parameters { gpa, size } => {
                    addresses(gpa, size).for_each(|gpa| mrtd.page_and_report(gpa, None, on_page));
                }
                Load::Vmsa { .. } => return Err(IgvmError::VpContext),
            }
        }
        Ok(mrtd.digest())
    }
}

impl Load<'_> {
    /// Bytes of guest memory, which are whole pages and end within the address space.
    fn check(&self) -> Result<u64, IgvmError> {
        let (gpa, size, align) = match *self {
            Self::Pages { gpa, size, .. } => (gpa, size as u64, size as u64),
            Self::Parameters { gpa, size } => (gpa, size, PAGE as u64),
            Self::Vmsa { gpa, .. } => (gpa, PAGE as u64, PAGE as u64),
        };
        let unaligned = [gpa, size].into_iter().find(|value| !value.is_multiple_of(align));
        match (unaligned, gpa.checked_add(size)) {
            (Some(value), _) => Err(IgvmError::Unaligned(value)),
            (None, None) => Err(IgvmError::TooLarge),
            (None, Some(_)) => Ok(size),
        }
    }
}

fn parameter_insert<'a>(header: &Header<'_>, areas: &mut Vec<(u32, u64)>) -> Result<Load<'a>, IgvmError> {
    let index = header.u32(12);
    let at = areas.iter().position(|(of, _)| *of == index).ok_or(IgvmError::ParameterArea(index))?;
    // An area can be inserted once.
    let (_, size) = areas.swap_remove(at);
    Ok(Load::Parameters { gpa: header.u64(0), size })
}

/// Pages of checked extent with their contents; pages without bytes are zero.
fn pages(gpa: u64, size: usize, bytes: Option<&[u8]>) -> impl Iterator<Item = (u64, &[u8; PAGE])> {
    let contents = move |page| bytes.map_or(Some(&[0; PAGE]), |bytes| bytes.as_chunks().0.get(page));
    addresses(gpa, size as u64).zip(0..).filter_map(move |(gpa, page)| Some((gpa, contents(page)?)))
}

fn addresses(gpa: u64, size: u64) -> impl Iterator<Item = u64> {
    (gpa..gpa.saturating_add(size)).step_by(PAGE)
}

/// Version 2 names the architecture and the page size; this module knows x86-64 and 4 KiB.
const fn machine(architecture: u32, page_size: u32) -> Result<(), IgvmError> {
    match (architecture, page_size) {
        (0, 4096) => Ok(()),
        (0, size) => Err(IgvmError::Machine(size)),
        (other, _) => Err(IgvmError::Machine(other)),
    }
}

fn variable_headers(mut bytes: &[u8]) -> Result<Vec<Header<'_>>, IgvmError> {
    let mut headers = Vec::new();
    while let (Some(kind), Some(length)) = (field(bytes, 0), field(bytes, 4)) {
        let (kind, length) = (u32::from_le_bytes(kind), usize_of(u32::from_le_bytes(length)));
        let end = length.checked_add(8).ok_or(IgvmError::Truncated)?;
        let body = bytes.get(8..end).ok_or(IgvmError::Truncated)?;
        let known = is_known(kind & !OPTIONAL);
        if !known && kind & OPTIONAL == 0 {
            return Err(IgvmError::Header(kind));
        }
        headers.extend(known.then_some(Header { kind: kind & !OPTIONAL, body }));
        // Headers begin at multiples of 8 bytes; the last one may lack its padding.
        bytes = end.checked_next_multiple_of(8).and_then(|next| bytes.get(next..)).unwrap_or_default();
    }
    if bytes.is_empty() { Ok(headers) } else { Err(IgvmError::Truncated) }
}

fn is_known(kind: u32) -> bool {
    matches!(kind, SUPPORTED_PLATFORM | PARAMETER_AREA..=VP_CONTEXT | SNP_ID_BLOCK)
        || IMMATERIAL.iter().any(|range| range.contains(&kind))
}

/// The CRC-32 of IEEE 802.3 over the headers, with the checksum field as zero. The headers of a file are small, so a
/// table is not worth its space.
fn checksum(fixed: &[u8], headers: &[u8]) -> u32 {
    let fixed = fixed.iter().enumerate().map(|(at, byte)| if (20..24).contains(&at) { 0 } else { *byte });
    !fixed.chain(headers.iter().copied()).fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 == 0 { 0 } else { 0xedb8_8320 })
    })
}

fn usize_of(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
