//! MRTD: the launch measurement of a TDX trust domain, and what a TDVF image makes of it.
//!
//! One SHA-384 stream from TDH.MNG.INIT to TDH.MR.FINALIZE. TDH.MEM.PAGE.ADD appends a 128-byte block with the guest
//! address, TDH.MR.EXTEND another one and the 256 bytes that it measures. No other leaf appends anything: a page that is
//! added and not extended contributes its address but not its contents.

use alloc::vec::Vec;
use core::fmt;
use core::hash::{Hash, Hasher};
use sha2::digest::common::hazmat::SerializableState;
use sha2::{Digest, Sha384};

/// Bytes that one TDH.MR.EXTEND measures.
pub const CHUNK: usize = 256;
const PAGE: usize = 4096;

/// The measurement while it is being built. Equal streams are equal measurements.
#[derive(Clone)]
pub struct Mrtd(Sha384);

impl Mrtd {
    /// The measurement after TDH.MNG.INIT.
    #[must_use]
    pub fn new() -> Self {
        Self(Sha384::new())
    }

    /// TDH.MEM.PAGE.ADD at guest address `gpa`.
    pub fn page_add(&mut self, gpa: u64) {
        self.block(b"MEM.PAGE.ADD", gpa);
    }

    /// TDH.MR.EXTEND of the 256 bytes at guest address `gpa`.
    pub fn extend(&mut self, gpa: u64, chunk: &[u8; CHUNK]) {
        self.block(b"MR.EXTEND", gpa);
        self.0.update(chunk);
    }

    /// Measures a page as KVM_TDX_INIT_MEM_REGION does: one ADD and, if its contents count, 16 EXTENDs in order.
    pub fn page(&mut self, gpa: u64, measured: Option<&[u8; PAGE]>) {
        self.page_add(gpa);
        let chunks = measured.map_or(&[] as &[[u8; CHUNK]], |page| page.as_chunks().0);
        for (i, chunk) in (0..).zip(chunks) {
            self.extend(gpa.wrapping_add(i * CHUNK as u64), chunk);
        }
    }

    /// [`Mrtd::page`], told to `on_page`.
    pub(super) fn page_and_report(
        &mut self,
        gpa: u64,
        measured: Option<&[u8; PAGE]>,
        on_page: &mut dyn FnMut(MeasuredPage),
    ) {
        self.page(gpa, measured);
        on_page(MeasuredPage { gpa, extended: measured.is_some(), digest: self.digest() });
    }

    /// The digest of what was measured so far; MRTD, if TDH.MR.FINALIZE came now.
    #[must_use]
    pub fn digest(&self) -> [u8; 48] {
        self.0.clone().finalize().into()
    }

    /// 128 bytes: the leaf's name from byte 0, the address at 16, zero elsewhere.
    fn block(&mut self, name: &[u8], gpa: u64) {
        let mut block = [0; 128];
        for (byte, letter) in block.iter_mut().zip(name) {
            *byte = *letter;
        }
        block[16..24].copy_from_slice(&gpa.to_le_bytes());
        self.0.update(block);
    }
}

impl Default for Mrtd {
    fn default() -> Self {
        Self::new()
    }
}

impl PartialEq for Mrtd {
    fn eq(&self, other: &Self) -> bool {
        self.0.serialize() == other.0.serialize()
    }
}

impl Eq for Mrtd {}

impl Hash for Mrtd {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.serialize().hash(state);
    }
}

impl fmt::Debug for Mrtd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mrtd(")?;
        self.digest().iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str(")")
    }
}

/// What a section of a TDVF image is for. The discriminant is the type in the image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum SectionKind {
    /// Boot firmware volume: code.
    Bfv = 0,
    /// Configuration firmware volume: variables.
    Cfv = 1,
    /// Where the VMM puts the TD hand-off block.
    TdHob = 2,
    /// Memory that the firmware needs before it can accept any.
    TempMem = 3,
    /// Memory that stays private.
    PermMem = 4,
    /// Kernel.
    Payload = 5,
    /// Parameters of the kernel.
    PayloadParam = 6,
    /// Information about the image, not loaded.
    TdInfo = 7,
    /// Parameters that the VMM provides.
    TdParams = 8,
}

impl SectionKind {
    const ALL: [Self; 9] = [
        Self::Bfv,
        Self::Cfv,
        Self::TdHob,
        Self::TempMem,
        Self::PermMem,
        Self::Payload,
        Self::PayloadParam,
        Self::TdInfo,
        Self::TdParams,
    ];
}

/// One section of a TDVF image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Section {
    /// What it is for.
    pub kind: SectionKind,
    /// First byte in the image.
    pub data_offset: u32,
    /// Bytes in the image; memory beyond them is zero.
    pub data_size: u32,
    /// Guest address of the first byte, page aligned.
    pub gpa: u64,
    /// Bytes of memory, a multiple of the page size.
    pub memory_size: u64,
    /// Bit 0: contents are measured. Bit 1: not added, the guest accepts the memory.
    pub attributes: u32,
}

impl Section {
    const MR_EXTEND: u32 = 1 << 0;
    const PAGE_AUG: u32 = 1 << 1;

    /// Whether the contents are measured.
    #[must_use]
    pub fn is_extended(&self) -> bool {
        self.attributes & Self::MR_EXTEND != 0
    }

    /// Whether the VMM adds the pages before the TD is finalized.
    #[must_use]
    pub fn is_added(&self) -> bool {
        self.attributes & Self::PAGE_AUG == 0 && self.kind != SectionKind::TdInfo
    }
}

/// Why an image is not a TDVF image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TdvfError {
    /// No metadata are found at the end of the image.
    NoMetadata,
    /// The metadata have a version other than 1.
    Version(u32),
    /// The metadata or the data of a section lie outside of the image.
    Truncated,
    /// A section has a type that is not known.
    SectionType(u32),
    /// A section's memory is not whole pages, is smaller than its data, or wraps.
    Memory(u64),
    /// The sections want more memory than any firmware does (4 GiB), in bytes.
    TooLarge(u64),
}

impl fmt::Display for TdvfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMetadata => f.write_str("no TDVF metadata in the image"),
            Self::Version(version) => write!(f, "TDVF metadata version {version}, not 1"),
            Self::Truncated => {
                f.write_str("TDVF metadata point outside of the image (its CODE half without VARS before it?)")
            }
            Self::SectionType(kind) => write!(f, "unknown TDVF section type {kind}"),
            Self::Memory(gpa) => write!(f, "TDVF section at {gpa:#x} is not whole pages that hold its data"),
            Self::TooLarge(size) => write!(f, "TDVF sections want {size:#x} bytes of memory"),
        }
    }
}

impl core::error::Error for TdvfError {}

/// A page that went into the measurement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MeasuredPage {
    /// Guest address.
    pub gpa: u64,
    /// Whether the contents were measured, not the address alone.
    pub extended: bool,
    /// Digest after the page.
    pub digest: [u8; 48],
}

/// The most memory that the sections of one image may ask to be added, in bytes.
const LARGEST: u64 = 1 << 32;
const TABLE_FOOTER: [u8; 16] = guid(0x96b5_82de, 0x1fb2, 0x45f7, *b"\xba\xea\xa3\x66\xc5\x5a\x08\x2d");
const TDX_METADATA: [u8; 16] = guid(0xe47a_6535, 0x984a, 0x4798, *b"\x86\x5e\x46\x85\xa7\xbf\x8e\xc2");

const fn guid(a: u32, b: u16, c: u16, tail: [u8; 8]) -> [u8; 16] {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    let mut bytes = [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], 0, 0, 0, 0, 0, 0, 0, 0];
    let mut i = 0;
    while i < 8 {
        bytes[8 + i] = tail[i];
        i += 1;
    }
    bytes
}

/// The sections of a TDVF image (Intel's "TDX Virtual Firmware Design Guide", section 11), in the image's order.
///
/// # Errors
/// Any [`TdvfError`].
pub fn tdvf_sections(image: &[u8]) -> Result<Vec<Section>, TdvfError> {
    let at = find_metadata(image).ok_or(TdvfError::NoMetadata)?;
    let header = |field: usize| u32_at(image, at + 4 * field).ok_or(TdvfError::Truncated);
    let (version, count) = (header(2)?, header(3)?);
    if version != 1 {
        return Err(TdvfError::Version(version));
    }
    (0..usize::try_from(count).unwrap_or(usize::MAX)).map(|i| section(image, at, i)).collect()
}

/// MRTD of a TD that is started from a TDVF image as QEMU and KVM do: the sections in the image's order, page by page.
///
/// `on_page` is told of every page.
///
/// # Errors
/// Any [`TdvfError`].
pub fn measure_tdvf(image: &[u8], on_page: &mut dyn FnMut(MeasuredPage)) -> Result<[u8; 48], TdvfError> {
    let sections = tdvf_sections(image)?;
    let wanted = sections.iter().filter(|s| s.is_added()).fold(0, |sum: u64, s| sum.saturating_add(s.memory_size));
    if wanted > LARGEST {
        return Err(TdvfError::TooLarge(wanted));
    }
    let mut mrtd = Mrtd::new();
    for section in sections.iter().filter(|section| section.is_added()) {
        measure_section(&mut mrtd, image, section, on_page);
    }
    Ok(mrtd.digest())
}

fn measure_section(mrtd: &mut Mrtd, image: &[u8], section: &Section, on_page: &mut dyn FnMut(MeasuredPage)) {
    let data = section_data(image, section).unwrap_or_default();
    let mut data = data.chunks(PAGE);
    for gpa in (section.gpa..section.gpa.saturating_add(section.memory_size)).step_by(PAGE) {
        let mut page = [0; PAGE];
        for (byte, from) in page.iter_mut().zip(data.next().unwrap_or_default()) {
            *byte = *from;
        }
        mrtd.page_and_report(gpa, section.is_extended().then_some(&page), on_page);
    }
}

fn section_data<'a>(image: &'a [u8], section: &Section) -> Option<&'a [u8]> {
    let start = usize::try_from(section.data_offset).ok()?;
    image.get(start..start.checked_add(usize::try_from(section.data_size).ok()?)?)
}

fn section(image: &[u8], metadata: usize, index: usize) -> Result<Section, TdvfError> {
    let at = index.checked_mul(32).and_then(|offset| offset.checked_add(metadata + 16)).ok_or(TdvfError::Truncated)?;
    let u32_field = |offset| u32_at(image, at + offset).ok_or(TdvfError::Truncated);
    let u64_field = |offset| Ok(u64::from(u32_field(offset)?) | u64::from(u32_field(offset + 4)?) << 32);
    let kind = u32_field(24)?;
    let section = Section {
        kind: *SectionKind::ALL.get(kind as usize).ok_or(TdvfError::SectionType(kind))?,
        data_offset: u32_field(0)?,
        data_size: u32_field(4)?,
        gpa: u64_field(8)?,
        memory_size: u64_field(16)?,
        attributes: u32_field(28)?,
    };
    check_section(image, section)
}

fn check_section(image: &[u8], section: Section) -> Result<Section, TdvfError> {
    section_data(image, &section).ok_or(TdvfError::Truncated)?;
    let whole_pages = (section.gpa | section.memory_size).is_multiple_of(PAGE as u64);
    let fits = u64::from(section.data_size) <= section.memory_size;
    let wraps = section.gpa.checked_add(section.memory_size).is_none();
    if section.is_added() && (!whole_pages || !fits || wraps) {
        return Err(TdvfError::Memory(section.gpa));
    }
    Ok(section)
}

/// Where the `TDVF` signature is: the table of GUIDs before the reset vector says so, or, in older images and td-shim,
/// a plain offset 32 bytes before the end.
fn find_metadata(image: &[u8]) -> Option<usize> {
    let from_table = || image.len().checked_sub(usize::try_from(table_entry(image)?).ok()?);
    let from_pointer = || usize::try_from(u32_at(image, image.len().checked_sub(0x20)?)?).ok();
    [from_table(), from_pointer()].into_iter().flatten().find_map(|at| signature(image, at))
}

/// The signature is at `at`, or after a GUID that is there.
fn signature(image: &[u8], at: usize) -> Option<usize> {
    let candidates = [Some(at), at.checked_add(16)];
    candidates.into_iter().flatten().find(|at| image.get(*at..).is_some_and(|rest| rest.starts_with(b"TDVF")))
}

/// The TDX entry's value in the GUID table: distance of the metadata from the end of the image.
///
/// The table grows downwards from 48 bytes before the end; each entry is its data, a u16 size of all three, its GUID.
fn table_entry(image: &[u8]) -> Option<u32> {
    let footer = image.len().checked_sub(0x30)?;
    if image.get(footer..footer + 16)? != TABLE_FOOTER {
        return None;
    }
    let size = usize::from(u16_at(image, footer.checked_sub(2)?)?);
    let bottom = (footer + 16).checked_sub(size)?;
    let mut end = footer - 2;
    while end > bottom {
        let (guid, len) = (end.checked_sub(16)?, usize::from(u16_at(image, end.checked_sub(18)?)?));
        if image.get(guid..end)? == TDX_METADATA {
            return u32_at(image, end.checked_sub(len)?);
        }
        end = end.checked_sub(len.max(18))?;
    }
    None
}

fn u32_at(image: &[u8], at: usize) -> Option<u32> {
    image.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

fn u16_at(image: &[u8], at: usize) -> Option<u16> {
    image.get(at..)?.first_chunk().map(|bytes| u16::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image with one measured section of a page and a half and one unmeasured page, found through the table.
    fn image(section_type: u32) -> Vec<u8> {
        let mut image = alloc::vec![0x90; 3 * PAGE];
        let metadata = 2 * PAGE;
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(metadata, b"TDVF");
        for (i, word) in [80u32, 1, 2].into_iter().enumerate() {
            put(metadata + 4 + 4 * i, &word.to_le_bytes());
        }
        let sections = [[0, 6144, 0x8000, 0, 8192, 0, section_type, 1], [0, 0, 0x1000, 0, 4096, 0, 3, 0]];
        for (i, word) in sections.into_iter().flatten().enumerate() {
            put(metadata + 16 + 4 * i, &u32::to_le_bytes(word));
        }
        let footer = 3 * PAGE - 0x30;
        put(footer, &TABLE_FOOTER);
        put(footer - 2, &40u16.to_le_bytes());
        put(footer - 18, &TDX_METADATA);
        put(footer - 20, &22u16.to_le_bytes());
        put(footer - 24, &u32::try_from(PAGE).unwrap().to_le_bytes());
        image
    }

    #[test]
    fn an_image_is_measured_section_by_section() {
        let mut pages = Vec::new();
        let mrtd = measure_tdvf(&image(0), &mut |page| pages.push((page.gpa, page.extended))).unwrap();
        assert_eq!(pages, [(0x8000, true), (0x9000, true), (0x1000, false)]);
        let mut expected = Mrtd::new();
        let mut half = [0x90; PAGE];
        half[2048..].fill(0);
        expected.page(0x8000, Some(&[0x90; PAGE]));
        expected.page(0x9000, Some(&half));
        expected.page(0x1000, None);
        assert_eq!(mrtd, expected.digest());
    }

    #[test]
    fn what_is_wrong_with_an_image_has_a_name() {
        assert_eq!(tdvf_sections(&[]), Err(TdvfError::NoMetadata));
        assert_eq!(tdvf_sections(&image(9)), Err(TdvfError::SectionType(9)));
        let mut wrong = image(0);
        wrong[2 * PAGE + 8] = 2;
        assert_eq!(tdvf_sections(&wrong), Err(TdvfError::Version(2)));
        let mut wrong = image(0);
        wrong[2 * PAGE + 16 + 4..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(tdvf_sections(&wrong), Err(TdvfError::Truncated));
        let mut wrong = image(0);
        wrong[2 * PAGE + 16 + 8] = 1;
        assert_eq!(tdvf_sections(&wrong), Err(TdvfError::Memory(0x8001)));
        let mut wrong = image(0);
        wrong[2 * PAGE + 16 + 32 + 20] = 1;
        assert_eq!(measure_tdvf(&wrong, &mut |_| ()), Err(TdvfError::TooLarge((1 << 32) + 3 * 4096)));
    }

    #[test]
    fn nothing_measured_is_the_hash_of_nothing() {
        assert_eq!(Mrtd::new().digest()[..4], [0x38, 0xb0, 0x60, 0xa7]);
    }
}
