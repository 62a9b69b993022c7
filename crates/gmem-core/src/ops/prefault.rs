use super::{Access, Action, Fault, FaultEnd, Operation, Origin, Parts, Reach, Step};
use crate::addr::{Gfn, GfnRange, PageNumber, Pfn};
use crate::vendor::{Mapping, Side};
use crate::vm::Vm;

/// Why a prefault did nothing. With at least one page done it is a success.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PrefaultError {
    /// The architecture does not allow it yet (SNP and TDX before the launch ends). EOPNOTSUPP.
    NotAllowed,
    /// The VM is dead. EIO.
    VmDead,
    /// The fault on this frame ended in a way that maps nothing; [`FaultEnd::Emulate`] is ENOENT.
    Fault(Gfn, FaultEnd),
}

/// `KVM_PRE_FAULT_MEMORY` over a validated range: one read fault after the other, each on the side that the attribute says.
///
/// No level can be asked for, and a frame that is mapped already is no error. One fault covers what its mapping covers.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Prefault {
    range: GfnRange,
    next: Gfn,
    fault: Option<Fault>,
}

type Output = Result<u64, PrefaultError>;

impl Prefault {
    /// Maps `range`.
    #[must_use]
    pub fn new(range: GfnRange) -> Self {
        Self { range, next: range.start(), fault: None }
    }

    /// The fault under way.
    #[must_use]
    pub fn fault(&self) -> Option<&Fault> {
        self.fault.as_ref()
    }

    /// Answers [`Action::GetUserPage`], as [`Fault::user_page`].
    pub fn user_page(&mut self, pfn: Option<Pfn>) {
        if let Some(fault) = &mut self.fault {
            fault.user_page(pfn);
        }
    }

    fn done(&self) -> u64 {
        self.next.0.saturating_sub(self.range.start().0)
    }

    fn fail(&mut self, error: PrefaultError) -> Step<Output> {
        self.fault = None;
        Step::Done(if self.done() > 0 { Ok(self.done()) } else { Err(error) })
    }

    fn start(&mut self, vm: &mut Vm) -> Step<Output> {
        if !self.range.contains(self.next) {
            return Step::Done(Ok(self.range.len()));
        }
        if !vm.arch.prefault_allowed() {
            return self.fail(PrefaultError::NotAllowed);
        }
        if vm.arch.is_dead() {
            return self.fail(PrefaultError::VmDead);
        }
        // The side of a prefault is that of the attribute; what is claimed is not looked at.
        let access = Access { gfn: self.next, claimed: Side::Private };
        let mut fault = Fault::new(access, Origin::Prefault);
        let step = fault.step(vm);
        self.fault = Some(fault);
        self.follow(step)
    }

    fn follow(&mut self, step: Step<FaultEnd>) -> Step<Output> {
        match step {
            Step::Do(action) => Step::Do(action),
            Step::Done(end) => self.ended(end),
        }
    }

    fn ended(&mut self, end: FaultEnd) -> Step<Output> {
        self.fault = None;
        match end {
            FaultEnd::Mapped(mapping) => {
                self.next = after(mapping).unwrap_or(self.range.end()).min(self.range.end());
                Step::Do(Action::Continue)
            }
            FaultEnd::Retry => Step::Do(Action::Continue),
            other => self.fail(PrefaultError::Fault(self.next, other)),
        }
    }
}

fn after(mapping: Mapping) -> Option<Gfn> {
    mapping.gfn.checked_add(mapping.level.pages())
}

impl Operation for Prefault {
    /// Pages done.
    type Output = Output;

    fn step(&mut self, vm: &mut Vm) -> Step<Output> {
        match &mut self.fault {
            None => self.start(vm),
            Some(fault) => {
                let step = fault.step(vm);
                self.follow(step)
            }
        }
    }

    fn reach(&self) -> Reach {
        self.fault.as_ref().map_or(Reach::reads(Parts::all()), Operation::reach)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Arch;
    use crate::ops::{Claim, FileClaim, SetRegion, run};
    use crate::vm::Rules;

    fn vm() -> Vm {
        let mut vm = Vm::with_frames(Arch::Default, Rules::default(), 64);
        let claim = Claim {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: 0x2000,
            userspace_addr: 0x10_0000,
            file: FileClaim::BadDescriptor,
            guest_memfd_offset: 0,
        };
        run(&mut SetRegion::new(claim), &mut vm, |_, _, _| {}).unwrap();
        vm
    }

    fn prefault(range: GfnRange) -> Output {
        run(&mut Prefault::new(range), &mut vm(), |prefault, _, action| {
            if let Action::GetUserPage { gfn, .. } = action {
                prefault.user_page(Some(Pfn(gfn.0)));
            }
        })
    }

    #[test]
    fn progress_counts_and_the_first_failure_tells_why() {
        let pages = |from, to| GfnRange::new(Gfn(from), Gfn(to)).unwrap();
        assert_eq!(prefault(pages(0, 2)), Ok(2));
        assert_eq!(prefault(pages(1, 4)), Ok(1), "one page outside of the slot's end was not reached");
        assert_eq!(prefault(pages(2, 3)), Err(PrefaultError::Fault(Gfn(2), FaultEnd::Emulate)));
    }
}
