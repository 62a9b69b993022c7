//! The state in which a program starts.

use gmem_core::Vm;
use gmem_core::addr::PAGE_SIZE;
use gmem_core::arch::Arch;
use gmem_core::file::{CreateError, FileFlags};
use gmem_core::ops::{SetAttributes, SetRegion, run};
use gmem_core::seal::Memfd;
use gmem_core::vendor::sev::SevKind;
use gmem_core::vendor::{Side, cca};

use crate::machine::{Events, Machine};
use crate::program::{ThreadKind, VmType};
use crate::turn::{Context, ThreadState, Turn, claim};

/// Everything but the threads.
#[derive(Clone, Debug)]
pub(crate) struct Start {
    pub(crate) vm: Vm,
    pub(crate) machine: Machine,
    pub(crate) memfds: Vec<Memfd>,
}

/// Why a program cannot start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StartError {
    /// The line of the operation in `setup`, or 0 for a declaration.
    pub line: usize,
    /// What went wrong.
    pub what: String,
}

impl core::fmt::Display for StartError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        if self.line == 0 { write!(f, "{}", self.what) } else { write!(f, "line {}: {}", self.line, self.what) }
    }
}

impl std::error::Error for StartError {}

fn arch(vm_type: VmType) -> Result<Arch, StartError> {
    Ok(match vm_type {
        VmType::Default => Arch::Default,
        VmType::SwProtected => Arch::SwProtected,
        VmType::Sev => Arch::sev(SevKind::Sev),
        VmType::SevEs => Arch::sev(SevKind::SevEs),
        VmType::Snp => Arch::snp(),
        VmType::Tdx => Arch::tdx(),
        VmType::Cca => Arch::cca(&cca::Config::default())
            .map_err(|error| StartError { line: 0, what: format!("no realm: {error}") })?,
        VmType::Pkvm => Arch::pkvm(),
    })
}

pub(crate) fn start(context: &Context<'_>, vm_type: VmType) -> Result<Start, StartError> {
    let program = context.program;
    let declared = |what: String| StartError { line: 0, what };
    let mut vm = Vm::with_frames(arch(vm_type)?, program.rules, program.frames());
    for file in &program.files {
        let size = file.pages * PAGE_SIZE;
        let id = vm
            .create_file(size, file.flags.bits(), FileFlags::all())
            .map_err(|error| declared(format!("file {}: {}", file.name, of_create(error))))?;
        if let Some(created) = vm.file_mut(id) {
            created.set_folio_level(file.folios);
        }
    }
    for slot in &program.slots {
        run(&mut SetRegion::new(claim(*slot)), &mut vm, |_, _, _| {})
            .map_err(|error| declared(format!("slot {} cannot be created: {error:?}", slot.number)))?;
    }
    // VMs without private memory have no attributes to set: the same program asks about ordinary memory there.
    let private = if vm.has_private_memory() { program.private.as_slice() } else { &[] };
    for range in private {
        run(&mut SetAttributes::new(*range, Side::Private), &mut vm, |_, _, _| {});
    }
    if let Arch::Sev(sev) = &mut vm.arch {
        // Nothing is loaded; the launch ends with an empty measurement.
        sev.launch_measure().map_err(|no| declared(format!("the launch cannot be measured: {no:?}")))?;
    }
    if !program.manual_launch {
        vm.finalize().map_err(|no| declared(format!("the launch cannot end: {no:?}")))?;
    }
    let memfds = program.memfds.iter().map(|memfd| Memfd::new(memfd.pages, memfd.folio)).collect();
    // A vCPU of its own runs the guest's part of the setup; what it has cached is flushed afterwards.
    let machine = Machine::new(program.vcpus() + 1);
    set_up(context, Start { vm, machine, memfds })
}

fn of_create(error: CreateError) -> &'static str {
    match error {
        CreateError::Flags(_) => "VMs of this type have no files with these flags",
        CreateError::Size(_) => "no file has this size",
    }
}

fn set_up(context: &Context<'_>, start: Start) -> Result<Start, StartError> {
    let program = context.program;
    let kind = ThreadKind::Vcpu { number: program.vcpus(), converts: true };
    let alone = Context { program, mutant: None };
    let Start { mut vm, mut machine, mut memfds } = start;
    let mut thread = ThreadState::new(0);
    let mut budget = 100_000;
    while usize::from(thread.pc) < program.setup.len() && budget > 0 {
        let at = usize::from(thread.pc);
        let mut turn = Turn::new(&alone, (0, kind, &program.setup), thread, (vm, machine, memfds)).with_notes();
        if !turn.take() {
            budget = 0;
        }
        let note;
        (note, Turn { thread, vm, machine, memfds, .. }) = (turn.note(), turn);
        if usize::from(thread.pc) > at + 1 || machine.events.contains(Events::UNEXPECTED) || budget == 0 {
            let line = program.setup.get(at).map_or(0, |stmt| stmt.line);
            let how = note.rsplit("; ").next().unwrap_or_default();
            return Err(StartError { line, what: format!("the setup goes wrong here: {how}") });
        }
        budget -= 1;
    }
    machine.flush();
    machine.flush_host();
    if program.asks_for(Events::REFAULTED) {
        machine.remember_lost();
    }
    Ok(Start { vm, machine, memfds })
}
