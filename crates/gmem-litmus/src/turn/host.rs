//! What the VMM and the host do in one step, and the VMM's mapping of a file.

use gmem_core::addr::{GfnRange, IndexRange, Level, PageIndex, PageRange, Pfn};
use gmem_core::invalidate::Filter;
use gmem_core::ops::{Lock, UserFault};
use gmem_core::vendor::{AccessKind, Contents, HostOutcome, Side};

use super::{Flight, Turn};
use crate::flight::{CoreOp, of_refusal};
use crate::machine::Events;
use crate::program::{HostPage, Op, Stmt};
use crate::touch::Touch;
use crate::value::{Errno, Seen, Value};

impl Turn<'_> {
    pub(super) fn immediately(&mut self, stmt: &Stmt) -> bool {
        self.touch = Touch::ALL;
        let seen = match stmt.op {
            Op::HostRead { page: HostPage::Mapped { file, index } }
            | Op::HostWrite { page: HostPage::Mapped { file, index }, .. } => {
                return self.begin_mapped(stmt, file, index);
            }
            Op::Memfd { memfd, op } => return self.memfd(stmt, memfd, op),
            Op::Allocate { file, range } => match self.allocate(file, range) {
                Some(seen) => seen,
                None => return false,
            },
            Op::Finalize => self.vm.finalize().map_or_else(|no| Seen::Errno(of_refusal(no)), |()| Seen::Ok),
            Op::CloseVm => {
                self.machine.vm_closed = true;
                self.destroy_if_unused();
                Seen::Ok
            }
            Op::HostRead { page } => self.host_read(page),
            Op::HostWrite { page, value } => self.host_write(page, value),
            Op::Pin { file, range, pinned } => {
                let id = self.file(file);
                match self.vm.file_mut(id) {
                    Some(file) if !pinned || file.side(range.start()) == Side::Shared => {
                        file.set_referenced(range, pinned);
                        Seen::Ok
                    }
                    _ => Seen::Errno(Errno::EFAULT),
                }
            }
            Op::Reclaim { file, index } => self.relocate(file, index, Seen::Busy),
            Op::Migrate { file, index } => self.relocate(file, index, Seen::Errno(Errno::EOPNOTSUPP)),
            Op::Reuse { file, index } => self.reuse(file, index),
            Op::Split { gfn } => self.machine.split_mapping(gfn).map_or(Seen::Nothing, |_| Seen::Ok),
            Op::Collapse { gfn } => {
                let block = GfnRange::page(gfn).align_out(Level::Page2M);
                // Only shared memory is ever collapsed: for a private mapping the zap would not be harmless.
                self.machine.zap(&mut self.vm, block, Filter::Only(Side::Shared));
                self.machine.flush();
                Seen::Ok
            }
            Op::Request { .. } | Op::Share { .. } => Seen::Errno(Errno::EINVAL),
            _ => Seen::Nothing,
        };
        self.finish(stmt, seen)
    }

    pub(super) fn allocate(&mut self, file: usize, range: IndexRange) -> Option<Seen> {
        let id = self.file(file);
        if !self.machine.can_lock(Lock::FileShared(id)) {
            return None;
        }
        let inside = self.vm.file(id).and_then(|file| file.all_pages()).is_some_and(|all| all.covers(range));
        Some(match self.vm.file_mut(id) {
            Some(file) if inside => {
                file.allocate(range);
                Seen::Ok
            }
            Some(_) => Seen::Errno(Errno::EINVAL),
            None => Seen::Errno(Errno::EBADF),
        })
    }

    /// A VM lives until its descriptor and its last file are closed.
    pub(super) fn destroy_if_unused(&mut self) {
        self.touch = Touch::ALL;
        if self.machine.vm_closed && self.vm.files().next().is_none() {
            self.vm.arch.destroy();
        }
    }

    pub(super) fn relocate(&self, file: usize, index: PageIndex, refused: Seen) -> Seen {
        let file = self.vm.file(self.file(file));
        if file.is_some_and(|file| file.relocate(index).is_err()) { refused } else { Seen::Ok }
    }

    /// The host gives memory that it got back to someone else, who uses it through the direct map.
    pub(super) fn reuse(&mut self, file: usize, index: PageIndex) -> Seen {
        let page = self.page(file, index);
        if self.vm.file(page.file).is_some_and(|file| file.is_present(index)) {
            return Seen::Busy;
        }
        let Some(frames) = self.frames_of_any(page) else { return Seen::Nothing };
        let pfn = frames.start();
        if self.machine.is_hidden(pfn) {
            self.record(Events::HIDDEN_AFTER_FREE);
            return Seen::HostFault;
        }
        match self.vm.arch.host_access(pfn, AccessKind::Store) {
            HostOutcome::Plain => Seen::Ok,
            _ => Seen::HostFault,
        }
    }

    pub(super) fn host_read(&mut self, page: HostPage) -> Seen {
        match page {
            HostPage::User(page) => {
                self.machine.user_frame(page).map_or(Seen::HostFault, |pfn| Seen::Value(self.machine.bytes(pfn).value))
            }
            HostPage::Direct { file, index } | HostPage::Mapped { file, index } => {
                let Some(frames) = self.frames_of_any(self.page(file, index)) else { return Seen::Nothing };
                let pfn = frames.start();
                if matches!(page, HostPage::Direct { .. }) && !self.machine.host_reaches(pfn) {
                    return Seen::HostFault;
                }
                self.look(pfn)
            }
        }
    }

    pub(super) fn look(&mut self, pfn: Pfn) -> Seen {
        match self.vm.arch.host_access(pfn, AccessKind::Load) {
            HostOutcome::Plain => {
                let bytes = self.machine.bytes(pfn);
                if bytes.secret {
                    self.record(Events::HOST_SAW_SECRET);
                }
                Seen::Value(bytes.value)
            }
            HostOutcome::Ciphertext | HostOutcome::Corrupted => Seen::Cipher,
            HostOutcome::Fault | HostOutcome::MachineCheck => Seen::HostFault,
        }
    }

    pub(super) fn host_write(&mut self, page: HostPage, value: Value) -> Seen {
        let pfn = match page {
            HostPage::User(page) => self.machine.user_frame(page),
            HostPage::Direct { file, index } | HostPage::Mapped { file, index } => {
                self.frames_of_any(self.page(file, index)).map(PageRange::start)
            }
        };
        let Some(pfn) = pfn else { return Seen::HostFault };
        if matches!(page, HostPage::Direct { .. }) && !self.machine.host_reaches(pfn) {
            return Seen::HostFault;
        }
        match self.vm.arch.host_access(pfn, AccessKind::Store) {
            HostOutcome::Plain => {
                self.machine.write(pfn, value, false);
                Seen::Ok
            }
            HostOutcome::Ciphertext | HostOutcome::Corrupted | HostOutcome::MachineCheck => {
                self.machine.becomes(PageRange::page(pfn), Contents::Undefined);
                Seen::Ok
            }
            HostOutcome::Fault => Seen::HostFault,
        }
    }

    pub(super) fn begin_mapped(&mut self, stmt: &Stmt, file: usize, index: PageIndex) -> bool {
        let id = self.file(file);
        if self.machine.is_mapped_for_vmm(id, index) {
            return self.touch_mapped(stmt);
        }
        self.map_in(stmt, CoreOp::UserFault(UserFault::new(id, index)))
    }

    /// The VMM's instruction runs again after its fault; the entry may have gone meanwhile.
    pub(super) fn touch_mapped(&mut self, stmt: &Stmt) -> bool {
        self.touch = Touch::ALL;
        let (page, value) = match stmt.op {
            Op::HostRead { page } => (page, None),
            Op::HostWrite { page, value } => (page, Some(value)),
            _ => return false,
        };
        let HostPage::Mapped { file, index } = page else { return false };
        let id = self.file(file);
        if !self.machine.is_mapped_for_vmm(id, index) {
            self.thread.flight = Flight::MappingIn(CoreOp::UserFault(UserFault::new(id, index)));
            return true;
        }
        let seen = match value {
            None => self.host_read(page),
            Some(value) => self.host_write(page, value),
        };
        self.finish(stmt, seen)
    }
}
