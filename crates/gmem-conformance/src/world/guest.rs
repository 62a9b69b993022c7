//! Guest accesses: one stub of the agent, and what the client does about the exits on the way.

use kvm_bindings::kvm_regs;

use super::{Shadow, SlotShadow, World};
use crate::agent::{self, ALIAS, PAGE, Stub, WINDOW, WINDOW_LEN};
use crate::machine::Exit;
use crate::ops::{Act, Area, Hex, Resolve};
use crate::sys;
use crate::transcript::{self, Exits, result};

/// Memory faults after which an access is abandoned.
const FAULTS: u32 = 8;
/// Exits of any kind after which an access is abandoned.
const EXITS: u32 = 20_000;

/// How an act begins.
struct Plan {
    regs: kvm_regs,
    /// A `ret` that the host writes first: area and offset.
    host_ret: Option<(usize, u64)>,
    resolve: Resolve,
}

impl World {
    pub(super) fn guest(&mut self, vm: usize, act: Act, resolve: Resolve) -> String {
        let Some(open) = &self.vms[vm] else { return "absent".into() };
        let Some(vcpu) = &open.vcpu else { return "no vcpu".into() };
        let plan = match plan(act, resolve, &open.shadow, self.kvm.hypercall_stub()) {
            Ok(plan) => plan,
            Err(why) => return format!("not run: {why}"),
        };
        if let Some((area, offset)) = plan.host_ret {
            open.areas[area].map.fill(super::host::len(offset), 1, 0xc3);
        }
        if let Err(errno) = vcpu.set_regs(&plan.regs) {
            return format!("registers {errno}");
        }
        let (exits, end) = self.run(vm, act, plan.resolve);
        let finished = end == Exit::Port(agent::DONE_PORT);
        let outcome = if finished { self.outcome(vm, act) } else { self.abandon(vm, end) };
        self.note_mmio(vm, touched(act), finished && exits.is_empty());
        if finished && exits.is_empty() {
            self.note_written(vm, act);
        }
        transcript::guest(exits, &outcome)
    }

    /// Runs until the stub ends or cannot go on; the last exit is the one that ended it.
    fn run(&mut self, vm: usize, act: Act, resolve: Resolve) -> (Exits, Exit) {
        let (mut exits, mut faults) = (Exits::default(), 0);
        let mut last = Exit::Other(0);
        for _ in 0..EXITS {
            let Some(vcpu) = self.vms[vm].as_ref().and_then(|vm| vm.vcpu.as_ref()) else { break };
            last = vcpu.run();
            match last {
                Exit::Mmio { write, gpa, .. } => {
                    exits.push(last);
                    if !write {
                        vcpu.answer_mmio(mmio_data(gpa));
                    }
                }
                Exit::Hypercall { args, .. } => {
                    exits.push(last);
                    let (answer, note) = self.convert(vm, act, args);
                    exits.note(note);
                    if let Some(vcpu) = &self.vms[vm].as_ref().and_then(|vm| vm.vcpu.as_ref()) {
                        vcpu.answer_hypercall(answer);
                    }
                }
                Exit::MemoryFault { flags, gpa, .. } if faults < FAULTS => {
                    exits.push(last);
                    let (note, go_on) = self.resolve(vm, resolve, faults, flags, gpa);
                    exits.note(note);
                    if !go_on {
                        break;
                    }
                    faults += 1;
                }
                _ => break,
            }
        }
        (exits, last)
    }

    /// Reacts to a memory fault: what was done, and whether to run again.
    fn resolve(&mut self, vm: usize, how: Resolve, faults: u32, flags: u64, gpa: u64) -> (String, bool) {
        match how {
            Resolve::Reset => ("reset".into(), false),
            Resolve::Again if faults < 2 => ("again".into(), true),
            Resolve::Flip | Resolve::Again => {
                let private = flags & sys::KVM_MEMORY_EXIT_FLAG_PRIVATE;
                let flipped = private ^ sys::KVM_MEMORY_ATTRIBUTE_PRIVATE;
                let outcome = self.attributes(vm, gpa, PAGE, flipped, 0);
                (format!("flip {}", result(outcome)), outcome.is_ok())
            }
            Resolve::Rebind(file) => self.rebind(vm, gpa, file),
        }
    }

    /// Does what the hypercall asks for, or answers what the operation says.
    fn convert(&mut self, vm: usize, act: Act, [gpa, pages, attributes]: [u64; 3]) -> (u64, String) {
        if let Act::Hypercall { answer: Some(Hex(answer)), .. } = act {
            return (answer, "refused".into());
        }
        let size = pages.saturating_mul(PAGE);
        if gpa < WINDOW || gpa.saturating_add(size) > WINDOW + WINDOW_LEN {
            return (errno_value(libc::EINVAL), "out of range".into());
        }
        let private = attributes & sys::MAP_GPA_RANGE_ENCRYPTED != 0;
        let wanted = if private { sys::KVM_MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
        let outcome = self.attributes(vm, gpa, size, wanted, 0);
        let answer = outcome.map_or_else(|errno| errno_value(errno.0), |_| 0);
        (answer, format!("convert {}", result(outcome)))
    }

    fn outcome(&self, vm: usize, act: Act) -> String {
        let vcpu = self.vms[vm].as_ref().and_then(|vm| vm.vcpu.as_ref());
        let rax = vcpu.map_or(0, |vcpu| vcpu.regs().map_or(0, |regs| regs.rax));
        match act {
            Act::Load { .. } | Act::Xadd { .. } | Act::Sum { .. } | Act::Hypercall { .. } => format!("rax {rax:#x}"),
            Act::Store { .. } | Act::Fill { .. } | Act::Copy { .. } | Act::Fetch { .. } => "done".into(),
        }
    }

    fn abandon(&self, vm: usize, end: Exit) -> String {
        if let Some(vcpu) = self.vms[vm].as_ref().and_then(|vm| vm.vcpu.as_ref()) {
            // A shutdown or a failed emulation leaves the vCPU in a state of its own.
            let _ = vcpu.long_mode();
        }
        match end {
            Exit::MemoryFault { .. } => "abandoned".into(),
            Exit::Port(port) => format!("abandoned at port {port:#x}"),
            Exit::Internal(suberror) => format!("internal error {suberror}"),
            Exit::Other(reason) => format!("exit {reason}"),
            Exit::Failed(errno, reason) => format!("{errno} exit {reason}"),
            Exit::Mmio { .. } | Exit::Hypercall { .. } => "abandoned after too many exits".into(),
        }
    }

    /// Keeps account of the pages for which KVM may hold an entry for MMIO; `direct` says that each page was accessed
    /// without any exit, which replaces the entry.
    pub(super) fn note_mmio(&mut self, vm: usize, pages: impl Iterator<Item = u64>, direct: bool) {
        let Some(vm) = &mut self.vms[vm] else { return };
        for page in pages {
            if vm.shadow.slot_at(page).is_none() && !vm.shadow.is_private(page) {
                vm.shadow.mmio.insert(page);
            } else if direct {
                vm.shadow.mmio.remove(&page);
            }
        }
    }

    fn note_written(&mut self, vm: usize, act: Act) {
        let Some(vm) = &mut self.vms[vm] else { return };
        let written = match act {
            Act::Store { .. } | Act::Xadd { .. } | Act::Fill { .. } => touched(act).collect(),
            Act::Copy { to, words, .. } => pages(to.0, words * 8).collect(),
            _ => vec![],
        };
        for page in written {
            let logging = |slot: &&mut SlotShadow| slot.has(sys::KVM_MEM_LOG_DIRTY_PAGES) && slot.contains(page);
            if !vm.shadow.is_private(page)
                && let Some(slot) = vm.shadow.slots.values_mut().find(logging)
            {
                slot.written.insert((page - slot.region.gpa) / PAGE);
            }
        }
    }
}

fn plan(act: Act, resolve: Resolve, shadow: &Shadow, hypercall: Stub) -> Result<Plan, &'static str> {
    if !matches!(act, Act::Sum { .. }) {
        refuse_mixture(shadow, touched(act))?;
    }
    refuse_stale(shadow, touched(act))?;
    let plain = |regs| Ok(Plan { regs, host_ret: None, resolve });
    let gva = |gpa: Hex, alias: bool| if alias { gpa.0 + ALIAS } else { gpa.0 };
    match act {
        Act::Load { gpa, log2, alias } => plain(kvm_regs { rbx: gva(gpa, alias), ..agent::entry(Stub::Load, log2) }),
        Act::Store { gpa, log2, value, alias } => {
            plain(kvm_regs { rbx: gva(gpa, alias), rdx: value.0, ..agent::entry(Stub::Store, log2) })
        }
        Act::Xadd { gpa, value, alias } => {
            plain(kvm_regs { rbx: gva(gpa, alias), rdx: value.0, ..agent::entry(Stub::Xadd, 0) })
        }
        Act::Fill { gpa, words, value } => {
            plain(kvm_regs { rdi: gpa.0, rcx: words, rax: value.0, ..agent::entry(Stub::Fill, 0) })
        }
        Act::Copy { from, to, words } => {
            plain(kvm_regs { rsi: from.0, rdi: to.0, rcx: words, ..agent::entry(Stub::Copy, 0) })
        }
        Act::Sum { gpa, words } => plain(kvm_regs { rbx: gpa.0, rcx: words, ..agent::entry(Stub::Sum, 0) }),
        Act::Fetch { gpa } => plan_fetch(gpa.0, resolve, shadow),
        Act::Hypercall { gpa, pages, attributes, .. } => plain(kvm_regs {
            rax: sys::KVM_HC_MAP_GPA_RANGE,
            rbx: gpa.0,
            rcx: pages.0,
            rdx: attributes.0,
            ..agent::entry(hypercall, 0)
        }),
    }
}

/// KVM's emulator reads and writes guest memory through userspace_addr without a look at attributes, so an instruction
/// that needs emulation (because it touches MMIO) must not touch private memory too: what it would see there is nobody's
/// promise.
fn refuse_mixture(shadow: &Shadow, pages: impl Iterator<Item = u64>) -> Result<(), &'static str> {
    let (mut emulated, mut private) = (false, false);
    for page in pages {
        match shadow.slot_at(page) {
            None => emulated = true,
            Some((_, slot)) if slot.has(sys::KVM_MEM_READONLY) => emulated = true,
            Some((_, slot)) => private |= shadow.is_private(page) || slot.mappable,
        }
    }
    if emulated && private { Err("emulation would meet private memory") } else { Ok(()) }
}

/// An access without a slot leaves an entry for MMIO in KVM's page tables that only a later shared mapping replaces.
/// While it is there, Linux (6.12 to 7.3) takes an access for shared whatever the attribute says, because it derives
/// privateness from the attribute "except for reserved-bit faults": the guest sees MMIO or, after any change of slots, a
/// memory fault without the PRIVATE flag, for ever. Whether that state is reached depends on what KVM happened to keep,
/// so such accesses are left out.
fn refuse_stale(shadow: &Shadow, mut pages: impl Iterator<Item = u64>) -> Result<(), &'static str> {
    if pages.any(|page| shadow.is_private(page) && shadow.mmio.contains(&page)) {
        Err("an entry for MMIO may still be there")
    } else {
        Ok(())
    }
}

/// The pages that an act's instructions access, in ascending order for each operand.
fn touched(act: Act) -> impl Iterator<Item = u64> {
    let (first, second) = match act {
        Act::Load { gpa, log2, .. } | Act::Store { gpa, log2, .. } => ((gpa.0, 1 << log2), (0, 0)),
        Act::Xadd { gpa, .. } => ((gpa.0, 8), (0, 0)),
        Act::Fill { gpa, words, .. } | Act::Sum { gpa, words } => ((gpa.0, words * 8), (0, 0)),
        Act::Copy { from, to, words } => ((from.0, words * 8), (to.0, words * 8)),
        Act::Fetch { gpa } => ((gpa.0, 1), (0, 0)),
        Act::Hypercall { .. } => ((0, 0), (0, 0)),
    };
    pages(first.0, first.1).chain(pages(second.0, second.1))
}

/// An instruction may only be fetched where a `ret` is sure to be found, if it is found at all: either the host writes
/// it into shared memory, or the guest itself writes it just before.
fn plan_fetch(gpa: u64, resolve: Resolve, shadow: &Shadow) -> Result<Plan, &'static str> {
    let resolve = if let Resolve::Rebind(_) = resolve { Resolve::Reset } else { resolve };
    let cold = |host_ret| Plan { regs: kvm_regs { rbx: gpa, ..agent::entry(Stub::Fetch, 0) }, host_ret, resolve };
    let plant = Plan { regs: kvm_regs { rbx: gpa, ..agent::entry(Stub::Plant, 0) }, host_ret: None, resolve };
    let Some((_, slot)) = shadow.slot_at(gpa) else { return Ok(cold(None)) };
    if slot.mappable || (shadow.is_private(gpa) && slot.has(sys::KVM_MEM_GUEST_MEMFD)) {
        return Ok(plant);
    }
    match slot.area {
        Some((area, offset)) if area <= Area::SharedAnonymous as usize => {
            let at = offset + (gpa - slot.region.gpa);
            if at < WINDOW_LEN { Ok(cold(Some((area, at)))) } else { Err("no host memory there") }
        }
        _ if slot.has(sys::KVM_MEM_READONLY) => Err("nobody can write a ret there"),
        _ => Ok(plant),
    }
}

/// The pages of a range.
pub(super) fn pages(at: u64, bytes: u64) -> impl Iterator<Item = u64> {
    (at / PAGE..(at + bytes).div_ceil(PAGE)).map(|gfn| gfn * PAGE)
}

/// What a device at a gpa would answer: something else at each address, the same in each run.
fn mmio_data(gpa: u64) -> [u8; 8] {
    gpa.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()
}

/// A hypercall's error as the guest sees it.
fn errno_value(errno: i32) -> u64 {
    (-i64::from(errno)).cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Region2;

    fn shadow(flags: u32, area: usize) -> Shadow {
        let region = Region2 { gpa: WINDOW, size: PAGE, flags, ..Default::default() };
        let slot = SlotShadow { region, area: Some((area, 0)), mappable: false, written: Default::default() };
        Shadow { slots: [(0, slot)].into(), ..Default::default() }
    }

    #[test]
    fn emulation_is_kept_away_from_private_memory() {
        let mut world = shadow(sys::KVM_MEM_GUEST_MEMFD, 0);
        assert!(refuse_mixture(&world, pages(WINDOW, 2 * PAGE)).is_ok());
        world.private.insert(WINDOW / PAGE);
        assert!(refuse_mixture(&world, pages(WINDOW, 2 * PAGE)).is_err());
        assert!(refuse_mixture(&world, pages(WINDOW, PAGE)).is_ok());
        assert!(refuse_mixture(&world, pages(WINDOW + PAGE, PAGE)).is_ok());
    }

    #[test]
    fn nothing_is_executed_that_nobody_wrote() {
        let plan = |shadow: &Shadow| plan_fetch(WINDOW + 8, Resolve::Flip, shadow);
        assert_eq!(plan(&shadow(0, 1)).ok().and_then(|p| p.host_ret), Some((1, 8)));
        assert!(plan(&shadow(sys::KVM_MEM_READONLY, 3)).is_err());
        let mut private = shadow(sys::KVM_MEM_GUEST_MEMFD, 1);
        private.private.insert(WINDOW / PAGE);
        let planted = plan(&private).ok();
        assert_eq!(planted.as_ref().and_then(|p| p.host_ret), None);
        assert_eq!(planted.map(|p| p.regs.rip), Some(agent::entry(Stub::Plant, 0).rip));
    }

    #[test]
    fn pages_of_a_range() {
        assert_eq!(pages(WINDOW, 8).collect::<Vec<_>>(), [WINDOW]);
        assert_eq!(pages(WINDOW + PAGE - 4, 8).collect::<Vec<_>>(), [WINDOW, WINDOW + PAGE]);
    }
}
