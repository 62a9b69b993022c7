//! SEAMCALL leaves as values, for whoever reads commands from elsewhere.

use super::{Answer, PageInfo, Tdx};

/// A leaf that this model does not have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotModelled(pub &'static str);

/// A SEAMCALL leaf with its operands. Addresses are claims: bytes, unchecked.
#[expect(missing_docs, reason = "the operands are those of the methods of the same name")]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command<'a> {
    /// TDH.MEM.SEPT.ADD.
    SeptAdd { at: PageInfo, page: u64, version: u8 },
    /// TDH.MEM.SEPT.REMOVE.
    SeptRemove { at: PageInfo, version: u8 },
    /// TDH.MEM.SEPT.RD.
    SeptRead { at: PageInfo },
    /// TDH.MEM.PAGE.ADD.
    PageAdd { at: PageInfo, page: u64, source: u64 },
    /// TDH.MEM.PAGE.AUG.
    PageAug { at: PageInfo, page: u64 },
    /// TDH.MEM.PAGE.REMOVE.
    PageRemove { at: PageInfo },
    /// TDH.MEM.PAGE.PROMOTE.
    PagePromote { at: PageInfo, version: u8 },
    /// TDH.MEM.PAGE.DEMOTE.
    PageDemote { at: PageInfo, page: u64 },
    /// TDH.MEM.PAGE.RELOCATE.
    PageRelocate { at: PageInfo, page: u64 },
    /// TDH.MEM.RANGE.BLOCK.
    RangeBlock { at: PageInfo },
    /// TDH.MEM.RANGE.UNBLOCK.
    RangeUnblock { at: PageInfo },
    /// TDH.MEM.TRACK.
    Track,
    /// TDH.MR.EXTEND, with the 256 bytes that the module finds at `gpa`.
    MrExtend { gpa: u64, chunk: &'a [u8; 256] },
    /// TDH.MR.FINALIZE.
    MrFinalize,
    /// TDH.PHYMEM.PAGE.RECLAIM.
    PageReclaim { page: u64 },
    /// TDH.MNG.VPFLUSHDONE.
    VpFlushDone,
    /// TDH.MNG.KEY.FREEID.
    KeyFreeId,
    /// A leaf of migration or any other that the model does not have.
    Other(&'static str),
}

impl Tdx {
    /// Runs any leaf.
    ///
    /// # Errors
    /// [`NotModelled`] for [`Command::Other`].
    pub fn execute(&mut self, command: Command<'_>) -> Result<Answer, NotModelled> {
        Ok(match command {
            Command::SeptAdd { at, page, version } => self.sept_add(at, page, version),
            Command::SeptRemove { at, version } => self.sept_remove(at, version),
            Command::SeptRead { at } => self.sept_read(at),
            Command::PageAdd { at, page, source } => self.page_add(at, page, source),
            Command::PageAug { at, page } => self.page_aug(at, page),
            Command::PageRemove { at } => self.page_remove(at),
            Command::PagePromote { at, version } => self.page_promote(at, version),
            Command::PageDemote { at, page } => self.page_demote(at, page),
            Command::PageRelocate { at, page } => self.page_relocate(at, page),
            Command::RangeBlock { at } => self.range_block(at),
            Command::RangeUnblock { at } => self.range_unblock(at),
            Command::Track => self.track(),
            Command::MrExtend { gpa, chunk } => self.mr_extend(gpa, chunk),
            Command::MrFinalize => self.mr_finalize(),
            Command::PageReclaim { page } => self.page_reclaim(page),
            Command::VpFlushDone => self.vp_flush_done(),
            Command::KeyFreeId => self.key_free_id(),
            Command::Other(leaf) => return Err(NotModelled(leaf)),
        })
    }
}
