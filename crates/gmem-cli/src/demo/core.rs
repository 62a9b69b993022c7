//! The same machine as a model: the core's operations, carried out on a table for stage 2 and a few bytes per page.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, anyhow, bail};
use gmem_core::Vm;
use gmem_core::addr::{Gfn, GfnRange, IndexRange, PageIndex, PageNumber, Pfn};
use gmem_core::arch::Arch;
use gmem_core::file::{FileFlags, FileId};
use gmem_core::invalidate::Filter;
use gmem_core::ops::{self, Action, Claim, Fault, FaultEnd, FileClaim, Operation, Origin, Pages};
use gmem_core::slot::SlotFlags;
use gmem_core::vendor;
use gmem_core::vm::{Rules, View};

use super::machine::{Access, Attempt, Machine, PAGE, Side, WITH_FILE, WITHOUT_FILE, Words};
use super::map::{Map, Page};

/// Address of the VMM's memory of guest frame 0.
const USER: u64 = 0x7f00_0000_0000;

/// What KVM and the host have outside of the core: translations and bytes.
#[derive(Debug, Default)]
struct Outside {
    stage2: BTreeMap<Gfn, (Pfn, vendor::Side)>,
    bytes: BTreeMap<Pfn, Words>,
    /// First frame of each file; a file is gone from the VM when its pages are freed.
    files: BTreeMap<FileId, Pfn>,
}

impl Outside {
    fn carry_out(&mut self, action: &Action) {
        match action {
            Action::Zap { range, filter } => self.zap(*range, *filter),
            Action::Map(mapping) => {
                self.stage2.insert(mapping.gfn, (mapping.pfn, mapping.side));
            }
            Action::Zero(pages) => self.bytes.extend(self.pfns(*pages).map(|pfn| (pfn, Words::default()))),
            // The bytes stay: whoever gets the memory next may read them, so a hole is only safe if the core asks for zeros.
            // Nothing else runs here: locks are free, translations are not cached, and faults fill stage 2.
            _ => {}
        }
    }

    fn zap(&mut self, range: GfnRange, filter: Filter) {
        self.stage2.retain(|gfn, (_, side)| !range.contains(*gfn) || !filter.includes(*side));
    }

    fn pfns(&self, pages: Pages) -> impl Iterator<Item = Pfn> + use<> {
        let first = self.files.get(&pages.file).copied().unwrap_or_default();
        pages.range.pages().filter_map(move |page| first.checked_add(page.0))
    }
}

/// The word for an action in the list of what was asked, where it says something to a reader.
fn word(action: &Action) -> Option<String> {
    Some(match action {
        Action::Zap { range, filter: Filter::Only(side) } => format!("zap {} {}", range.len(), side_of(*side)),
        Action::Zap { range, filter: Filter::Both } => format!("zap {}", range.len()),
        Action::Flush => "flush".to_owned(),
        Action::Synchronize => "wait for faults".to_owned(),
        Action::Zero(_) => "zero".to_owned(),
        Action::Free(pages) => format!("free {}", pages.range.len()),
        Action::Map(_) => "map".to_owned(),
        _ => return None,
    })
}

/// The model.
#[derive(Debug)]
pub(super) struct Model {
    vm: Option<Vm>,
    file: Option<FileId>,
    outside: Outside,
    /// What does the actions; tests put a wrong one here.
    carry_out: fn(&mut Outside, &Action),
    asked: Vec<String>,
}

impl Model {
    /// A machine without a VM.
    pub(super) fn new() -> Self {
        let outside = Outside::default();
        Self { vm: None, file: None, outside, carry_out: Outside::carry_out, asked: Vec::new() }
    }

    /// Runs an operation to its end and notes its steps under `name`.
    fn run<O: Operation>(
        &mut self,
        name: &str,
        mut operation: O,
        mut answer: impl FnMut(&mut O, &Vm, &Action),
    ) -> Result<O::Output> {
        let vm = self.vm.as_mut().context("there is no VM")?;
        let (outside, carry_out) = (&mut self.outside, self.carry_out);
        let mut words = Vec::new();
        let output = ops::run(&mut operation, vm, |operation, vm, action| {
            words.extend(word(&action));
            carry_out(outside, &action);
            answer(operation, vm, &action);
        });
        let steps = if words.is_empty() { String::new() } else { format!(": {}", words.join(", ")) };
        self.asked.push(format!("{name}{steps}"));
        match vm.audit().first() {
            None => Ok(output),
            Some(fault) => bail!("after {name} the bookkeeping is wrong: {fault:?}"),
        }
    }

    fn add_slot(&mut self, slot: u32, gfns: &Range<u64>, file: Option<FileId>) -> Result<()> {
        let claim = Claim {
            slot,
            flags: file.map_or(SlotFlags::empty(), |_| SlotFlags::GUEST_MEMFD).bits(),
            guest_phys_addr: gfns.start * PAGE,
            memory_size: (gfns.end - gfns.start) * PAGE,
            userspace_addr: USER + gfns.start * PAGE,
            file: file.map_or(FileClaim::BadDescriptor, FileClaim::File),
            guest_memfd_offset: 0,
        };
        let result = self.run("SetRegion", ops::SetRegion::new(claim), |_, _, _| ())?;
        result.map_err(|error| anyhow!("SetRegion: {error:?}"))
    }

    fn fault(&mut self, gfn: Gfn, origin: Origin) -> Result<FaultEnd> {
        let access = ops::Access { gfn, claimed: vendor::Side::Shared };
        self.run("Fault", Fault::new(access, origin), |fault, vm, action| {
            if let Action::GetUserPage { slot, gfn } = action {
                fault.user_page(vm.slots().get(*slot).map(|slot| pfn_at(slot.hva_of(*gfn))));
            }
        })
    }

    /// The frame behind `gfn` as the guest finds it, or the exit.
    fn touch(&mut self, gfn: u64) -> Result<std::result::Result<Pfn, Access>> {
        let gfn = Gfn(gfn);
        if let Some((pfn, _)) = self.outside.stage2.get(&gfn) {
            return Ok(Ok(*pfn));
        }
        Ok(match self.fault(gfn, Origin::Guest)? {
            FaultEnd::Mapped(mapping) => Ok(mapping.pfn),
            FaultEnd::MemoryFault(fault) => {
                Err(Access::MemoryFault { gpa: fault.gfn.gpa(), size: PAGE, side: side_of(fault.side) })
            }
            other => Err(Access::Other(format!("{other:?}"))),
        })
    }

    fn bytes(&self, pfn: Pfn) -> Words {
        self.outside.bytes.get(&pfn).copied().unwrap_or_default()
    }
}

/// The VMM's page at an address stands for its host frame; far below the frames that stand for a file's pages.
fn pfn_at(hva: u64) -> Pfn {
    Pfn(hva / PAGE)
}

fn user_pfn(gfn: u64) -> Pfn {
    pfn_at(USER + gfn * PAGE)
}

fn side_of(side: vendor::Side) -> Side {
    match side {
        vendor::Side::Shared => Side::Shared,
        vendor::Side::Private => Side::Private,
    }
}

fn frames(gfns: &Range<u64>) -> Result<GfnRange> {
    GfnRange::new(Gfn(gfns.start), Gfn(gfns.end)).context("no frames")
}

fn page(vm: &Vm, gfn: u64) -> Page {
    match vm.view(Gfn(gfn)) {
        View::NoSlot => Page::NoSlot,
        View::UserMemory { .. } => Page::Shared,
        View::FilePage { file, index, .. } if vm.file(file).is_some_and(|file| file.is_present(index)) => Page::Private,
        View::FilePage { .. } => Page::Hole,
        View::Unbacked(_) => Page::Fault,
    }
}

impl Machine for Model {
    fn create_vm(&mut self) -> Result<()> {
        self.asked.push("Vm::new(SwProtected)".to_owned());
        self.vm = Some(Vm::new(Arch::SwProtected, Rules::default()));
        Ok(())
    }

    fn has_private_memory(&mut self) -> bool {
        self.vm.as_ref().is_some_and(Vm::has_private_memory)
    }

    fn create_file(&mut self) -> Result<u64> {
        let size = (WITH_FILE.end - WITH_FILE.start) * PAGE;
        self.asked.push(format!("Vm::create_file({size:#x})"));
        let vm = self.vm.as_mut().context("there is no VM")?;
        let id = vm.create_file(size, 0, FileFlags::all()).map_err(|error| anyhow!("create_file: {error:?}"))?;
        let file = vm.file(id).context("the file is not there")?;
        self.outside.files.insert(id, file.pfn(PageIndex(0)));
        self.file = Some(id);
        Ok(file.pages() * PAGE)
    }

    fn add_slot_with_file(&mut self) -> Result<()> {
        self.add_slot(0, &WITH_FILE, self.file)
    }

    fn add_slot_without_file(&mut self) -> Result<()> {
        self.add_slot(1, &WITHOUT_FILE, None)
    }

    fn set_side(&mut self, gfns: Range<u64>, side: Side) -> Result<()> {
        let to = if side == Side::Private { vendor::Side::Private } else { vendor::Side::Shared };
        self.run("SetAttributes", ops::SetAttributes::new(frames(&gfns)?, to), |_, _, _| ())
    }

    fn guest_read(&mut self, gfn: u64) -> Result<Access> {
        Ok(match self.touch(gfn)? {
            Ok(pfn) => Access::Done(self.bytes(pfn)),
            Err(exit) => exit,
        })
    }

    fn guest_write(&mut self, gfn: u64, words: Words) -> Result<Access> {
        Ok(match self.touch(gfn)? {
            Ok(pfn) => {
                self.outside.bytes.insert(pfn, words);
                Access::Done(words)
            }
            Err(exit) => exit,
        })
    }

    fn host_read(&mut self, gfn: u64) -> Words {
        self.bytes(user_pfn(gfn))
    }

    fn host_write(&mut self, gfn: u64, words: Words) {
        self.outside.bytes.insert(user_pfn(gfn), words);
    }

    fn host_finds(&mut self, words: Words) -> bool {
        WITH_FILE.chain(WITHOUT_FILE).any(|gfn| self.host_read(gfn) == words)
    }

    fn try_file(&mut self) -> Vec<Attempt> {
        let file = self.file.and_then(|id| self.vm.as_ref()?.file(id));
        let mappable = file.is_some_and(|file| file.flags().contains(FileFlags::MMAP));
        let refusal = (!mappable).then(|| "it was made without the flag MMAP".to_owned());
        vec![Attempt { what: "mapping the file", refusal }]
    }

    fn punch(&mut self, gfns: Range<u64>) -> Result<()> {
        let file = self.file.context("there is no file")?;
        let index = |gfn: u64| PageIndex(gfn - WITH_FILE.start);
        let pages = IndexRange::new(index(gfns.start), index(gfns.end)).context("no pages")?;
        let result = self.run("PunchHole", ops::PunchHole::new(file, pages), |_, _, _| ())?;
        result.map_err(|error| anyhow!("PunchHole: {error:?}"))
    }

    fn prefault(&mut self, gfns: Range<u64>) -> Result<Option<u64>> {
        let mut left = gfns.end - gfns.start;
        for gfn in gfns {
            match self.fault(Gfn(gfn), Origin::Prefault)? {
                FaultEnd::Mapped(_) => left -= 1,
                _ => break,
            }
        }
        Ok(Some(left * PAGE))
    }

    fn close_file(&mut self) -> Result<()> {
        let file = self.file.take().context("there is no file")?;
        self.run("CloseFile", ops::CloseFile::new(file), |_, _, _| ())
    }

    fn map(&self) -> Map {
        let one = |gfn| self.vm.as_ref().map_or(Page::NoSlot, |vm| page(vm, gfn));
        Map(vec![WITH_FILE.map(one).collect(), WITHOUT_FILE.map(one).collect()])
    }

    fn asked(&mut self) -> Vec<String> {
        std::mem::take(&mut self.asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::map::Paint;
    use crate::demo::tour::{self, Outcome, STEPS, Step};

    fn steps(mut model: Model) -> Vec<Step> {
        tour::take(&mut model, |_| Ok(())).unwrap()
    }

    #[test]
    fn the_tour_of_the_core_shows_what_the_documentation_says() {
        let steps = steps(Model::new());
        assert_eq!(steps.len(), STEPS);
        for step in &steps {
            assert!(!step.observations.is_empty(), "{}", step.title);
            for seen in &step.observations {
                assert_eq!(seen.outcome, Outcome::Ok, "{}: {}", step.title, seen.text);
            }
        }
        let maps: Vec<String> = steps.iter().map(|step| step.after.draw(Paint::Plain)).collect();
        let expected = [
            "........ ....",
            "........ ....",
            "ssssssss ssss",
            "ooooooss ssss",
            "PPooooss ssss",
            "PPooooss ssss",
            "Psooooss ssss",
            "PPooooss ssss",
            "oPooooss ssss",
            "PPPPPPss ssss",
            "PPPPPPss !sss",
            "!!!!!!ss ssss",
        ];
        assert_eq!(maps, expected);
    }

    fn failed_steps(carry_out: fn(&mut Outside, &Action)) -> Vec<&'static str> {
        let steps = steps(Model { carry_out, ..Model::new() });
        steps.iter().filter(|step| step.failures() > 0).map(|step| step.title).collect()
    }

    #[test]
    fn the_observations_notice_a_host_that_keeps_translations() {
        let failed = failed_steps(|outside, action| match action {
            Action::Zap { .. } => {}
            action => outside.carry_out(action),
        });
        let noticed =
            ["Six pages become private", "The host looks for it", "And back to private", "A fault on purpose"];
        assert!(noticed.iter().all(|title| failed.contains(title)), "{failed:?}");
    }

    #[test]
    fn the_observations_notice_a_host_that_does_not_zero() {
        let failed = failed_steps(|outside, action| match action {
            Action::Zero(_) => {}
            action => outside.carry_out(action),
        });
        assert_eq!(failed, ["A hole is punched"]);
    }
}
