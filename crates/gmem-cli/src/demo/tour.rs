//! The tour: what happens in each step, and what must be observed.

use anyhow::Result;
use serde::Serialize;

use super::machine::{Access, Machine, PAGE, Side, WITH_FILE, WITHOUT_FILE, Words};
use super::map::Map;

const HOST: Words = Words(*b"put here by VMM.");
const SECRET: Words = Words(*b"the guest secret");
const QUESTION: Words = Words(*b"ping from a VMM.");
const ANSWER: Words = Words(*b"pong from guest.");
const ZEROS: Words = Words([0; 16]);

const FIRST: u64 = WITH_FILE.start;
const SECOND: u64 = FIRST + 1;
/// What the tour makes private of the slot with a file; the rest stays shared.
const PRIVATE: std::ops::Range<u64> = FIRST..FIRST + 6;
/// Private frames that the guest never touches before they are prefaulted.
const UNTOUCHED: std::ops::Range<u64> = FIRST + 2..FIRST + 6;
const LAST: u64 = WITH_FILE.end - 1;

/// What became of one expectation.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// It was met.
    Ok,
    /// It was not: what was seen instead.
    Failed(String),
    /// It could not be tried: the missing capability.
    Skipped(&'static str),
}

/// One expectation and what became of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Observation {
    /// What must be seen.
    pub(super) text: String,
    /// What was seen.
    pub(super) outcome: Outcome,
}

/// One step of the tour, taken.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// From 1 on.
    pub(super) number: usize,
    /// A few words.
    pub(super) title: &'static str,
    /// One sentence: what happens.
    pub(super) story: &'static str,
    /// What was asked of KVM.
    pub(super) asked: Vec<String>,
    /// The memory before the step.
    pub(super) before: Map,
    /// The memory when its requests are done, before anyone looks: a look may give memory to a page.
    pub(super) after: Map,
    /// What was seen.
    pub(super) observations: Vec<Observation>,
}

impl Step {
    /// Observations that contradict what must be seen.
    pub(super) fn failures(&self) -> usize {
        let failed = |observation: &&Observation| matches!(observation.outcome, Outcome::Failed(_));
        self.observations.iter().filter(failed).count()
    }
}

/// A step while it is taken.
struct Scene<'m> {
    machine: &'m mut dyn Machine,
    after: Option<Map>,
    observations: Vec<Observation>,
}

impl Scene<'_> {
    /// The requests of the step are done: what follows is looking.
    fn done(&mut self) {
        self.after = Some(self.machine.map());
    }

    fn expect(&mut self, text: impl Into<String>, met: bool, seen: &dyn ToString) {
        let outcome = if met { Outcome::Ok } else { Outcome::Failed(seen.to_string()) };
        self.observations.push(Observation { text: text.into(), outcome });
    }

    fn skip(&mut self, text: &str, missing: &'static str) {
        self.observations.push(Observation { text: text.into(), outcome: Outcome::Skipped(missing) });
    }

    fn guest_reads(&mut self, gfn: u64, words: Words) -> Result<()> {
        let access = self.machine.guest_read(gfn)?;
        self.expect(format!("at {:#x} the guest reads {words}", gfn * PAGE), access == Access::Done(words), &access);
        Ok(())
    }

    fn guest_writes(&mut self, gfn: u64, words: Words) -> Result<()> {
        let access = self.machine.guest_write(gfn, words)?;
        self.expect(
            format!("at {:#x} the guest writes {words}", gfn * PAGE),
            matches!(access, Access::Done(_)),
            &access,
        );
        Ok(())
    }

    fn guest_faults(&mut self, gfn: u64) -> Result<()> {
        let expected = Access::MemoryFault { gpa: gfn * PAGE, size: PAGE, side: Side::Private };
        let access = self.machine.guest_read(gfn)?;
        self.expect(format!("at {:#x} the guest's read ends in {expected}", gfn * PAGE), access == expected, &access);
        Ok(())
    }

    fn host_reads(&mut self, gfn: u64, words: Words) {
        let seen = self.machine.host_read(gfn);
        self.expect(format!("at {:#x} the VMM reads {words}", gfn * PAGE), seen == words, &seen);
    }
}

/// A step before it is taken.
struct Act {
    title: &'static str,
    story: &'static str,
    play: fn(&mut Scene<'_>) -> Result<()>,
}

const ACTS: [Act; 12] = [
    Act {
        title: "A VM whose memory can be private",
        story: "KVM makes VMs of several types; the memory of this one can be taken out of the VMM's reach, page by page.",
        play: |scene| {
            scene.machine.create_vm()?;
            scene.done();
            let private = scene.machine.has_private_memory();
            scene.expect("the VM takes the attribute \"private\"", private, &"it takes none");
            Ok(())
        },
    },
    Act {
        title: "A guest_memfd",
        story: "Private memory comes from a file that belongs to the VM and that nobody but its guest can reach.",
        play: |scene| {
            let size = scene.machine.create_file()?;
            scene.done();
            let expected = (WITH_FILE.end - WITH_FILE.start) * PAGE;
            scene.expect(format!("the file has {expected:#x} bytes"), size == expected, &size);
            Ok(())
        },
    },
    Act {
        title: "Memory slots",
        story: "One slot gets the VMM's memory and the file, another one the VMM's memory alone; all of it is shared so far.",
        play: |scene| {
            scene.machine.add_slot_with_file()?;
            scene.machine.add_slot_without_file()?;
            scene.done();
            WITH_FILE.chain(WITHOUT_FILE).for_each(|gfn| scene.machine.host_write(gfn, HOST));
            scene.guest_reads(FIRST, HOST)?;
            scene.guest_reads(WITHOUT_FILE.start, HOST)
        },
    },
    Act {
        title: "Six pages become private",
        story: "An attribute says which pages are private; from now on the guest has these from the file and not from the VMM.",
        play: |scene| {
            scene.machine.set_side(PRIVATE, Side::Private)?;
            scene.done();
            scene.guest_reads(FIRST, ZEROS)?;
            scene.guest_reads(LAST, HOST)
        },
    },
    Act {
        title: "The guest writes a secret",
        story: "The guest stores to two private pages and finds again what it stored.",
        play: |scene| {
            scene.guest_writes(FIRST, SECRET)?;
            scene.guest_writes(SECOND, SECRET)?;
            scene.done();
            scene.guest_reads(FIRST, SECRET)?;
            scene.guest_reads(SECOND, SECRET)
        },
    },
    Act {
        title: "The host looks for it",
        story: "The VMM searches its own memory of the guest and tries what can be tried with the file.",
        play: |scene| {
            scene.done();
            scene.host_reads(FIRST, HOST);
            let found = scene.machine.host_finds(SECRET);
            scene.expect("the secret is nowhere in the VMM's memory of the guest", !found, &"it is there");
            for attempt in scene.machine.try_file() {
                let text = match &attempt.refusal {
                    Some(refusal) => format!("{} is refused: {refusal}", attempt.what),
                    None => format!("{} is refused", attempt.what),
                };
                scene.expect(text, attempt.refusal.is_some(), &"it succeeds");
            }
            Ok(())
        },
    },
    Act {
        title: "One page is converted to shared",
        story: "Guest and VMM can now talk through this page; what was private in it stays in the file, out of sight.",
        play: |scene| {
            scene.machine.set_side(SECOND..SECOND + 1, Side::Shared)?;
            scene.done();
            scene.machine.host_write(SECOND, QUESTION);
            scene.guest_reads(SECOND, QUESTION)?;
            scene.guest_writes(SECOND, ANSWER)?;
            scene.host_reads(SECOND, ANSWER);
            Ok(())
        },
    },
    Act {
        title: "And back to private",
        story: "The guest has its private page again, with the secret in it; the VMM keeps what was said in public.",
        play: |scene| {
            scene.machine.set_side(SECOND..SECOND + 1, Side::Private)?;
            scene.done();
            scene.guest_reads(SECOND, SECRET)?;
            scene.host_reads(SECOND, ANSWER);
            Ok(())
        },
    },
    Act {
        title: "A hole is punched",
        story: "The VMM cannot read private memory, but it can take it away: the page goes back to the host, its bytes do not.",
        play: |scene| {
            scene.machine.punch(FIRST..FIRST + 1)?;
            scene.done();
            scene.guest_reads(FIRST, ZEROS)?;
            scene.guest_reads(SECOND, SECRET)
        },
    },
    Act {
        title: "Pages are prefaulted",
        story: "Memory is given and mapped before the guest asks for it, so that it need not wait later.",
        play: |scene| {
            let left = scene.machine.prefault(UNTOUCHED)?;
            scene.done();
            let Some(left) = left else {
                scene.skip("pages can be prefaulted", "KVM_CAP_PRE_FAULT_MEMORY");
                return Ok(());
            };
            scene.expect("nothing is left to do", left == 0, &format!("{left:#x} bytes are left"));
            scene.guest_reads(UNTOUCHED.start, ZEROS)
        },
    },
    Act {
        title: "A fault on purpose",
        story: "A page becomes private in the slot without a file: nothing can back it, KVM_RUN ends, and the VMM makes it shared again.",
        play: |scene| {
            let gfn = WITHOUT_FILE.start;
            scene.machine.set_side(gfn..gfn + 1, Side::Private)?;
            scene.done();
            scene.guest_faults(gfn)?;
            scene.machine.set_side(gfn..gfn + 1, Side::Shared)?;
            scene.guest_reads(gfn, HOST)
        },
    },
    Act {
        title: "The file is closed while it is bound",
        story: "The slot stays, but what was private is gone for good, even for its guest; shared pages are not concerned.",
        play: |scene| {
            scene.machine.close_file()?;
            scene.done();
            scene.guest_faults(SECOND)?;
            scene.guest_reads(LAST, HOST)
        },
    },
];

/// Takes the tour and tells each step when it is over. It ends early where a request is refused: what follows would say
/// nothing.
///
/// # Errors
/// Those of `tell`.
pub(super) fn take(machine: &mut dyn Machine, mut tell: impl FnMut(&Step) -> Result<()>) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for (index, act) in ACTS.iter().enumerate() {
        let (step, granted) = play(machine, index + 1, act);
        tell(&step)?;
        steps.push(step);
        if !granted {
            break;
        }
    }
    Ok(steps)
}

/// Takes one step; whether every request was granted.
fn play(machine: &mut dyn Machine, number: usize, act: &Act) -> (Step, bool) {
    let before = machine.map();
    let mut scene = Scene { machine, after: None, observations: Vec::new() };
    let result = (act.play)(&mut scene);
    if let Err(error) = &result {
        scene.expect("every request is granted", false, &format!("{error:#}"));
    }
    let Scene { machine, after, observations } = scene;
    let after = after.unwrap_or_else(|| machine.map());
    let asked = counted(&machine.asked());
    (Step { number, title: act.title, story: act.story, asked, before, after, observations }, result.is_ok())
}

/// Equal neighbours as one, with their number.
fn counted(asked: &[String]) -> Vec<String> {
    let runs = asked.chunk_by(|a, b| a == b);
    let one =
        |run: &[String]| if run.len() == 1 { run[0].clone() } else { format!("{} ({} times)", run[0], run.len()) };
    runs.map(one).collect()
}

/// Steps of a whole tour.
pub(super) const STEPS: usize = ACTS.len();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_neighbours_are_counted() {
        let asked = ["a", "a", "b", "a"].map(str::to_owned).to_vec();
        assert_eq!(counted(&asked), ["a (2 times)", "b", "a"]);
    }
}
