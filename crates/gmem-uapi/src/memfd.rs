//! The calls on a guest_memfd's own descriptor.

use std::sync::Arc;

use gmem_core::file::{FileFlags, FileId};
use gmem_core::vendor::Side;
use gmem_host::backing::Backing;
use gmem_host::maps;
use gmem_host::sys::SignalsBlocked;
use rustix::io::Errno;

use crate::vm::VmObject;

/// A guest_memfd of an emulated VM. Closed when the last descriptor and the last mapping are gone.
#[derive(Debug)]
pub(crate) struct FileObject {
    pub(crate) vm: Arc<VmObject>,
    pub(crate) id: FileId,
    pub(crate) size: u64,
    pub(crate) flags: FileFlags,
    /// What the client's descriptors are of, once it has any.
    pub(crate) placeholder: Option<maps::FileId>,
}

impl Drop for FileObject {
    fn drop(&mut self) {
        // A child of fork has a copy of the bookkeeping; the file is its parent's.
        if self.vm.check_owner().is_ok() {
            self.vm.close_file(self.id);
        }
    }
}

/// A system call on the descriptor, without its number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileCall {
    /// read, readv, write, writev and whatever copies through them.
    ReadWrite,
    /// pread, pwrite and their vector forms, with the offset.
    ReadWriteAt(i64),
    /// lseek, with its last argument.
    Seek(i32),
    /// ftruncate, fchmod, fchown, futimens: changes of the inode.
    ChangeInode,
    /// fsync, fdatasync, readahead: of a page cache that the file has not.
    Sync,
    /// fallocate.
    Fallocate {
        /// `FALLOC_FL_*`.
        mode: i32,
        /// Bytes.
        offset: i64,
        /// Bytes.
        len: i64,
    },
    /// sendfile or splice with the file on either end.
    Splice,
    /// sendfile from an offset of the file.
    SendFrom,
    /// copy_file_range with the file on either end; the other one is this descriptor.
    CopyRange {
        /// The other descriptor.
        other: i32,
        /// Whether that is a guest_memfd too.
        same_kind: bool,
        /// The call's flags, of which there are none yet.
        flags: u32,
    },
    /// fcntl with F_ADD_SEALS or F_GET_SEALS.
    Seals,
    /// fgetxattr, fsetxattr, fremovexattr.
    Attribute,
}

/// The last `SEEK_*` that the kernel knows, SEEK_HOLE.
const SEEK_MAX: i32 = 4;
const KEEP_SIZE: i32 = 1;
const PUNCH_HOLE: i32 = 2;
/// Modes that the VFS knows and lets through to a file system.
const VFS_MODES: [i32; 9] =
    [0, KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE, 0x08, 0x10, 0x10 | KEEP_SIZE, 0x20, 0x40, 0x40 | KEEP_SIZE];

impl FileObject {
    /// Carries a call out, with the kernel's answer.
    pub(crate) fn call(&self, call: FileCall, signals: &SignalsBlocked) -> Result<i64, Errno> {
        match call {
            // The file has neither read nor write, cannot be resized or synced, and has no position.
            FileCall::ReadWrite | FileCall::ChangeInode | FileCall::Sync | FileCall::Splice | FileCall::Seals => {
                Err(Errno::INVAL)
            }
            FileCall::Seek(whence) if !(0..=SEEK_MAX).contains(&whence) => Err(Errno::INVAL),
            FileCall::ReadWriteAt(offset) if offset < 0 => Err(Errno::INVAL),
            FileCall::ReadWriteAt(_) | FileCall::Seek(_) | FileCall::SendFrom => Err(Errno::SPIPE),
            FileCall::Attribute => Err(Errno::OPNOTSUPP),
            FileCall::CopyRange { other, .. } if !gmem_host::kvm::is_open(other) => Err(Errno::BADF),
            FileCall::CopyRange { same_kind, flags, .. } if same_kind || flags != 0 => Err(Errno::INVAL),
            // Another file system.
            FileCall::CopyRange { .. } => Err(Errno::XDEV),
            FileCall::Fallocate { mode, offset, len } => self.fallocate(mode, offset, len, signals).map(|()| 0),
        }
    }

    /// `vfs_fallocate()`, then `kvm_gmem_fallocate()`.
    fn fallocate(&self, mode: i32, offset: i64, len: i64, signals: &SignalsBlocked) -> Result<(), Errno> {
        let (start, size) = match (u64::try_from(offset), u64::try_from(len)) {
            (Ok(start), Ok(size)) if size > 0 => (start, size),
            _ => return Err(Errno::INVAL),
        };
        if !VFS_MODES.contains(&mode) {
            return Err(Errno::OPNOTSUPP);
        }
        offset.checked_add(len).ok_or(Errno::FBIG)?;
        match mode {
            KEEP_SIZE => self.vm.allocate(self.id, start, size, signals),
            mode if mode == KEEP_SIZE | PUNCH_HOLE => self.vm.punch(self.id, start, size),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    /// `mmap` of the descriptor.
    pub(crate) fn map(&self, map: Map) -> Result<usize, Errno> {
        const MAP_TYPE: u32 = 0x0f;
        const MAP_PRIVATE: u32 = 0x02;
        const MAP_SHARED_VALIDATE: u32 = 0x03;
        const PROT_EXEC: u32 = 4;
        // mmap's own checks come before the file's.
        let known = (1..=MAP_SHARED_VALIDATE).contains(&(map.flags & MAP_TYPE));
        if map.len == 0 || !map.offset.is_multiple_of(gmem_core::addr::PAGE_SIZE) || !known {
            return Err(Errno::INVAL);
        }
        // `path_noexec()` in do_mmap().
        if map.prot & PROT_EXEC != 0 && self.vm.profile.noexec {
            return Err(Errno::PERM);
        }
        if !self.flags.contains(FileFlags::MMAP) {
            return Err(Errno::NODEV);
        }
        if map.flags & MAP_TYPE == MAP_PRIVATE {
            return Err(Errno::INVAL);
        }
        let state = self.vm.read();
        let kind = state.core.file(self.id).map_or(Side::Private, gmem_core::file::File::kind);
        match kind {
            Side::Shared => map.of(state.backing(self.id).ok_or(Errno::BADF)?),
            // Every access beyond the end of an empty file is SIGBUS, as it is to a private page.
            Side::Private => map.of(&Backing::new(0)?),
        }
    }
}

/// Arguments of `mmap` besides the descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Map {
    pub(crate) address: usize,
    pub(crate) len: usize,
    pub(crate) prot: u32,
    pub(crate) flags: u32,
    pub(crate) offset: u64,
}

impl Map {
    fn of(self, backing: &Backing) -> Result<usize, Errno> {
        backing.map_for_client(self.address, self.len, self.prot, self.flags, self.offset)
    }
}
