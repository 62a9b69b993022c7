//! What an OVMF image says about itself, and the table of hashes that a VMM puts into a guest for it.
//!
//! An image ends with a table of GUIDed entries, read backwards from 32 bytes before its end (edk2
//! `OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm`). One entry points at the SEV metadata, a list of the pages that the VMM has to
//! prepare (`OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm`). Images are untrusted bytes; nothing here panics on them.

use alloc::vec::Vec;

use sha2::{Digest, Sha256};

/// Where an image ends in guest physical memory: at 4 GiB.
const END_GPA: u64 = 1 << 32;
/// Bytes of a table entry's header: length and GUID.
const HEADER_LEN: usize = 18;
/// Bytes between the table and the end of the image.
const TAIL_LEN: usize = 32;

const FOOTER: Guid = guid(0x96b5_82de, 0x1fb2, 0x45f7, 0xbaea_a366_c55a_082d);
const HASH_TABLE: Guid = guid(0x7255_371f, 0x3a3b, 0x4b04, 0x927b_1da6_efa8_d454);
const RESET_BLOCK: Guid = guid(0x00f7_71de, 0x1a7e, 0x4fcb, 0x890e_68c7_7e2f_b44e);
const METADATA: Guid = guid(0xdc88_6566, 0x984a, 0x4798, 0xa75e_5585_a7bf_67cc);
const SVSM_INFO: Guid = guid(0xa789_a612, 0x0597, 0x4c4b, 0xa49f_cbb1_fe9d_1ddd);
const HASHES_HEADER: Guid = guid(0x9438_d606, 0x4f22, 0x4cc9, 0xb479_a793_d411_fd21);
const HASHES_KERNEL: Guid = guid(0x4de7_9437, 0xabd2, 0x427f, 0xb835_d5b1_72d2_045b);
const HASHES_INITRD: Guid = guid(0x44ba_f731, 0x3a2f, 0x4bd7, 0x9af1_41e2_9169_781d);
const HASHES_CMDLINE: Guid = guid(0x97d0_2dd8, 0xbd20, 0x4c94, 0xaa78_e771_4d36_ab2a);

type Guid = [u8; 16];

/// The bytes of a GUID: the first three groups are little endian, the rest is as written.
const fn guid(a: u32, b: u16, c: u16, d: u64) -> Guid {
    let (a, b, c, d) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes(), d.to_be_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

/// Why an image cannot be measured.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum OvmfError {
    /// The image is shorter than its table, or longer than the space below its end address.
    Size,
    /// An entry of the table is shorter than its own header.
    EntrySize,
    /// The SEV metadata are not where the table says.
    NoMetadata,
    /// The SEV metadata are of a version other than 1.
    MetadataVersion(u32),
    /// The SEV metadata end before the number of sections that they name.
    MetadataTruncated,
    /// No address for the reset of further vCPUs (SEV_ES_RESET_BLOCK), without which no VMSA can be made.
    NoResetBlock,
    /// Not an SVSM image: it has no SVSM_INFO.
    NoSvsmInfo,
}

impl core::fmt::Display for OvmfError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Size => "the image is too short, or too long for its place",
            Self::EntrySize => "an entry of the image's table is shorter than its header",
            Self::NoMetadata => "the image's SEV metadata are not where its table says",
            Self::MetadataVersion(version) => {
                return write!(f, "the image's SEV metadata have version {version}, not 1");
            }
            Self::MetadataTruncated => "the image's SEV metadata are cut short",
            Self::NoResetBlock => "the image names no reset address (SEV_ES_RESET_BLOCK)",
            Self::NoSvsmInfo => "the image has no SVSM_INFO",
        })
    }
}

impl core::error::Error for OvmfError {}

/// What a VMM has to do with a section of guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SectionKind {
    /// Pages that firmware uses before it can validate memory.
    SecMem,
    /// The page for secrets.
    Secrets,
    /// The page for CPUID answers.
    Cpuid,
    /// Calling area of an SVSM.
    SvsmCaa,
    /// The page for the hashes of kernel, initrd and command line.
    KernelHashes,
    /// A number without a meaning here.
    Unknown(u32),
}

impl SectionKind {
    const fn from_raw(raw: u32) -> Self {
        match raw {
            1 => Self::SecMem,
            2 => Self::Secrets,
            3 => Self::Cpuid,
            4 => Self::SvsmCaa,
            0x10 => Self::KernelHashes,
            other => Self::Unknown(other),
        }
    }
}

/// A section that the SEV metadata list.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Section {
    /// Guest physical address.
    pub gpa: u32,
    /// Bytes.
    pub size: u32,
    /// What it is for.
    pub kind: SectionKind,
}

/// A parsed image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ovmf<'a> {
    data: &'a [u8],
    gpa: u64,
    entries: Vec<(Guid, &'a [u8])>,
    sections: Vec<Section>,
}

impl<'a> Ovmf<'a> {
    /// Parses an image that ends at 4 GiB. An image without a table parses; it has no sections.
    ///
    /// # Errors
    /// [`OvmfError`], except the last two.
    pub fn parse(data: &'a [u8]) -> Result<Self, OvmfError> {
        Self::parse_at(data, END_GPA)
    }

    /// Parses an image that ends at another guest physical address, as an SVSM below the firmware.
    ///
    /// # Errors
    /// As [`Ovmf::parse`].
    pub fn parse_at(data: &'a [u8], end: u64) -> Result<Self, OvmfError> {
        let len = u64::try_from(data.len()).map_err(|_| OvmfError::Size)?;
        let gpa = end.checked_sub(len).ok_or(OvmfError::Size)?;
        let entries = table(data)?;
        let mut ovmf = Self { data, gpa, entries, sections: Vec::new() };
        ovmf.sections = ovmf.parse_metadata()?;
        Ok(ovmf)
    }

    /// The bytes.
    #[must_use]
    pub const fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Guest physical address of the first byte.
    #[must_use]
    pub const fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Sections of the SEV metadata in their order.
    #[must_use]
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The last entry of a kind wins, as a reader does that fills a map from the end of the table.
    fn entry(&self, guid: Guid) -> Option<&'a [u8]> {
        self.entries.iter().rev().find(|(of, _)| *of == guid).map(|(_, data)| *data)
    }

    fn word(&self, guid: Guid) -> Option<u32> {
        let mut word = [0; 4];
        for (to, from) in word.iter_mut().zip(self.entry(guid)?) {
            *to = *from;
        }
        Some(u32::from_le_bytes(word))
    }

    /// Guest physical address for the table of hashes, if the image looks for one.
    #[must_use]
    pub fn hash_table_gpa(&self) -> Option<u32> {
        self.word(HASH_TABLE)
    }

    /// Where vCPUs other than the first start.
    ///
    /// # Errors
    /// [`OvmfError::NoResetBlock`].
    pub fn reset_eip(&self) -> Result<u32, OvmfError> {
        self.word(RESET_BLOCK).ok_or(OvmfError::NoResetBlock)
    }

    /// Where the vCPUs of an SVSM start.
    ///
    /// # Errors
    /// [`OvmfError::NoSvsmInfo`].
    pub fn svsm_entry(&self) -> Result<u64, OvmfError> {
        let offset = self.word(SVSM_INFO).ok_or(OvmfError::NoSvsmInfo)?;
        self.gpa.checked_add(u64::from(offset)).ok_or(OvmfError::Size)
    }

    fn parse_metadata(&self) -> Result<Vec<Section>, OvmfError> {
        let Some(from_end) = self.word(METADATA) else { return Ok(Vec::new()) };
        let start = usize::try_from(from_end).ok().and_then(|from_end| self.data.len().checked_sub(from_end));
        let data = start.and_then(|start| self.data.get(start..)).ok_or(OvmfError::NoMetadata)?;
        let word = |index: usize| read_u32(data, index.saturating_mul(4));
        let (Some(b"ASEV"), Some(size), Some(version), Some(count)) = (data.get(..4), word(1), word(2), word(3)) else {
            return Err(OvmfError::NoMetadata);
        };
        if version != 1 {
            return Err(OvmfError::MetadataVersion(version));
        }
        let end = usize::try_from(size).unwrap_or(usize::MAX).min(data.len());
        let sections = data.get(16..end).unwrap_or_default();
        (0..count).map(|index| section(sections, index).ok_or(OvmfError::MetadataTruncated)).collect()
    }
}

fn section(sections: &[u8], index: u32) -> Option<Section> {
    let at = usize::try_from(index).ok()?.checked_mul(12)?;
    let word = |offset: usize| read_u32(sections, at.checked_add(offset)?);
    Some(Section { gpa: word(0)?, size: word(4)?, kind: SectionKind::from_raw(word(8)?) })
}

fn read_u32(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// Length and GUID in the last bytes of a table.
fn last_header(table: &[u8]) -> Option<(usize, Guid)> {
    let (len, guid) = table.last_chunk::<HEADER_LEN>()?.split_first_chunk::<2>()?;
    Some((usize::from(u16::from_le_bytes(*len)), guid.try_into().ok()?))
}

/// Entries in the order in which they are found, from the end to the start.
fn table(data: &[u8]) -> Result<Vec<(Guid, &[u8])>, OvmfError> {
    let head = data.len().checked_sub(TAIL_LEN).and_then(|end| data.get(..end)).ok_or(OvmfError::Size)?;
    let (total, guid) = last_header(head).ok_or(OvmfError::Size)?;
    let mut entries = Vec::new();
    let body = total.checked_sub(HEADER_LEN).filter(|_| guid == FOOTER);
    let Some(body) = body else { return Ok(entries) };
    let end = head.len() - HEADER_LEN;
    let start = end.checked_sub(body).ok_or(OvmfError::Size)?;
    let mut rest = head.get(start..end).unwrap_or_default();
    while let Some((len, guid)) = last_header(rest) {
        let payload = len.checked_sub(HEADER_LEN).ok_or(OvmfError::EntrySize)?;
        let (before, _) = rest.split_at(rest.len() - HEADER_LEN);
        let (next, data) = before.split_at(before.len().saturating_sub(payload));
        entries.push((guid, data));
        rest = next;
    }
    Ok(entries)
}

/// Hashes of what a VMM loads for direct boot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BootHashes {
    kernel: [u8; 32],
    initrd: [u8; 32],
    cmdline: [u8; 32],
}

impl BootHashes {
    /// Bytes of the table: a header and three entries, padded to 16.
    pub const TABLE_LEN: usize = 176;
    const ENTRY_LEN: u16 = 50;
    const UNPADDED_LEN: u16 = 168;

    /// Hashes kernel, initrd (empty if there is none) and command line, to which the terminating zero is added.
    #[must_use]
    pub fn new(kernel: &[u8], initrd: &[u8], cmdline: &[u8]) -> Self {
        let cmdline = Sha256::new().chain_update(cmdline).chain_update([0]).finalize();
        Self { kernel: Sha256::digest(kernel).into(), initrd: Sha256::digest(initrd).into(), cmdline: cmdline.into() }
    }

    /// The table as QEMU writes it.
    #[must_use]
    pub fn table(&self) -> [u8; Self::TABLE_LEN] {
        let entries = [(HASHES_CMDLINE, self.cmdline), (HASHES_INITRD, self.initrd), (HASHES_KERNEL, self.kernel)];
        let header = HASHES_HEADER.into_iter().chain(Self::UNPADDED_LEN.to_le_bytes());
        let entries = entries
            .into_iter()
            .flat_map(|(guid, hash)| guid.into_iter().chain(Self::ENTRY_LEN.to_le_bytes()).chain(hash));
        let mut table = [0; Self::TABLE_LEN];
        for (to, from) in table.iter_mut().zip(header.chain(entries)) {
            *to = from;
        }
        table
    }

    /// The page with the table at a byte offset, if it fits.
    #[must_use]
    pub fn page(&self, offset: usize) -> Option<[u8; 4096]> {
        let mut page = [0; 4096];
        page.get_mut(offset..offset.checked_add(Self::TABLE_LEN)?)?.copy_from_slice(&self.table());
        Some(page)
    }
}
