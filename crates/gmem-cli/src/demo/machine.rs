//! What the tour needs of a virtual machine, whoever provides it.

use std::fmt;
use std::ops::Range;

use anyhow::Result;

use super::map::Map;

/// Bytes of a page.
pub(super) const PAGE: u64 = 4096;

/// Guest frames of the slot that has a guest_memfd.
pub(super) const WITH_FILE: Range<u64> = 0x10..0x18;
/// Guest frames of the slot that has none.
pub(super) const WITHOUT_FILE: Range<u64> = 0x20..0x24;

/// The two kinds of guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    Shared,
    Private,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shared => "shared",
            Self::Private => "private",
        })
    }
}

/// The first bytes of a page: what the tour writes and reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Words(pub(super) [u8; 16]);

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.iter().all(|byte| *byte == 0) {
            true => f.write_str("zeros"),
            false => write!(f, "\"{}\"", self.0.escape_ascii()),
        }
    }
}

/// How an access of the guest ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Access {
    /// It was performed; these bytes are in the page.
    Done(Words),
    /// `KVM_EXIT_MEMORY_FAULT`, with its fields.
    MemoryFault { gpa: u64, size: u64, side: Side },
    /// Something that the tour does not expect.
    Other(String),
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done(words) => write!(f, "{words}"),
            Self::MemoryFault { gpa, size, side } => {
                write!(f, "KVM_EXIT_MEMORY_FAULT {{gpa {gpa:#x}, size {size:#x}, {side}}}")
            }
            Self::Other(what) => f.write_str(what),
        }
    }
}

/// A way in which a host might get at private bytes, and what came of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Attempt {
    /// The way.
    pub(super) what: &'static str,
    /// Why it fails, or `None` if it does not.
    pub(super) refusal: Option<String>,
}

/// A virtual machine whose memory can be private. An error means that the request was refused.
pub(super) trait Machine {
    /// Makes the VM and its vCPU.
    fn create_vm(&mut self) -> Result<()>;
    /// Whether the VM can have private memory.
    fn has_private_memory(&mut self) -> bool;
    /// Makes a guest_memfd as large as [`WITH_FILE`]; its size in bytes.
    fn create_file(&mut self) -> Result<u64>;
    /// Binds the file to [`WITH_FILE`].
    fn add_slot_with_file(&mut self) -> Result<()>;
    /// Makes [`WITHOUT_FILE`] ordinary memory.
    fn add_slot_without_file(&mut self) -> Result<()>;
    /// Converts frames.
    fn set_side(&mut self, gfns: Range<u64>, side: Side) -> Result<()>;
    /// The guest loads the first bytes of a frame.
    fn guest_read(&mut self, gfn: u64) -> Result<Access>;
    /// The guest stores the first bytes of a frame.
    fn guest_write(&mut self, gfn: u64, words: Words) -> Result<Access>;
    /// The VMM reads its own memory of a frame.
    fn host_read(&mut self, gfn: u64) -> Words;
    /// The VMM writes its own memory of a frame.
    fn host_write(&mut self, gfn: u64, words: Words);
    /// Whether the bytes are anywhere in the VMM's own memory of the guest.
    fn host_finds(&mut self, words: Words) -> bool;
    /// Everything that a VMM can try with the file.
    fn try_file(&mut self) -> Vec<Attempt>;
    /// Takes memory away from the file behind these frames.
    fn punch(&mut self, gfns: Range<u64>) -> Result<()>;
    /// Maps frames before the guest asks; bytes left to do, or `None` where there is no such request.
    fn prefault(&mut self, gfns: Range<u64>) -> Result<Option<u64>>;
    /// Closes the file's only descriptor.
    fn close_file(&mut self) -> Result<()>;
    /// The memory as it is now.
    fn map(&self) -> Map;
    /// What was asked since the last call, in order.
    fn asked(&mut self) -> Vec<String>;
}
