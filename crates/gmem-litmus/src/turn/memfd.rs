//! Memfds of the first form of the idea.

use gmem_core::addr::{PageRange, Pfn};
use gmem_core::seal::{Hole, MemfdRead, ReadStep, SealError, Split};

use super::{Flight, Turn};
use crate::machine::Machine;
use crate::program::{MemfdOp, Op, Stmt};
use crate::touch::Touch;
use crate::value::{Errno, Seen, Value};

impl Turn<'_> {
    pub(super) fn memfd(&mut self, stmt: &Stmt, number: usize, op: MemfdOp) -> bool {
        let Some(memfd) = self.memfds.get_mut(number) else { return false };
        let frame = |page: u64| Pfn((1 << 42) + ((number as u64) << 32) + page);
        let split = |may_split: bool| if may_split { Split::Works } else { Split::Fails };
        let result = match op {
            MemfdOp::Read(page) => return self.read_memfd(stmt, MemfdRead::new(page)),
            MemfdOp::Seal => memfd.seal(),
            MemfdOp::Map => memfd.map(),
            MemfdOp::Unmap => {
                memfd.unmap();
                Ok(())
            }
            MemfdOp::Write(page, value) => memfd.write(page).map(|()| self.machine.write(frame(page), value, false)),
            MemfdOp::GuestWrite(page, value) => {
                memfd.touch(page).map(|()| self.machine.write(frame(page), value, true))
            }
            MemfdOp::Punch { first, end, may_split } => {
                memfd.punch(first, end, split(may_split)).map(|hole| make_hole(&mut self.machine, hole, frame))
            }
            MemfdOp::Truncate { bytes_from, may_split } => {
                memfd.truncate(bytes_from, split(may_split)).map(|hole| make_hole(&mut self.machine, hole, frame))
            }
            MemfdOp::Migrate(_) | MemfdOp::Swap(_) => memfd.relocate(),
        };
        self.finish(stmt, result.map_or_else(of_seal, |()| Seen::Ok))
    }

    pub(super) fn read_memfd(&mut self, stmt: &Stmt, mut read: MemfdRead) -> bool {
        self.touch = Touch::ALL;
        let Op::Memfd { memfd: number, op: MemfdOp::Read(page) } = stmt.op else { return false };
        let Some(memfd) = self.memfds.get(number) else { return false };
        match read.step(memfd) {
            Ok(ReadStep::Continue) => {
                self.say(|| "is permitted".into());
                self.thread.flight = Flight::Reading(read);
                true
            }
            Ok(ReadStep::Copy) if !memfd.is_present(page) => self.finish(stmt, Seen::Value(Value::Zero)),
            Ok(ReadStep::Copy) => {
                let seen = self.look(Pfn((1 << 42) + ((number as u64) << 32) + page));
                self.finish(stmt, seen)
            }
            Err(error) => self.finish(stmt, of_seal(error)),
        }
    }
}

fn make_hole(machine: &mut Machine, hole: Hole, frame: impl Fn(u64) -> Pfn) {
    hole.freed.into_iter().for_each(|page| machine.free(PageRange::page(frame(page))));
    hole.zeroed.into_iter().for_each(|page| machine.fill(PageRange::page(frame(page)), Value::Zero));
}

fn of_seal(error: SealError) -> Seen {
    Seen::Errno(match error {
        SealError::InUse | SealError::SplitFailed => Errno::EBUSY,
        SealError::Sealed => Errno::EPERM,
        SealError::Partial => Errno::EINVAL,
        SealError::BeyondEnd => Errno::EFAULT,
    })
}
