//! Guest memory as one instruction sees it: every access is translated and checked before it is made.

use gmem_core::addr::{Gfn, PAGE_SIZE as PAGE};
use rustix::io::Errno;

use super::state::{Cpu, Source};
use super::{Access, AccessKind, GuestView};

/// Why following an instruction ended before its last access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stop {
    /// This access is the one.
    Found(Access),
    /// The guest itself faults here; what follows never happens.
    GuestFault,
    /// What follows depends on memory that cannot be read, or on a case that the module documentation excludes.
    Unknown,
    /// The vCPU did not answer.
    Failed(Errno),
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Self {
        Self::Failed(errno)
    }
}

pub(super) type Step<T = ()> = Result<T, Stop>;

/// What an access does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Touch {
    Load,
    Store,
    /// Load and store of one location.
    Modify,
    Fetch,
}

impl Touch {
    pub(super) fn writes(self) -> bool {
        matches!(self, Self::Store | Self::Modify)
    }

    /// What is asked about a page: what is reported is the last.
    fn kinds(self) -> &'static [AccessKind] {
        match self {
            Self::Load => &[AccessKind::Load],
            Self::Store => &[AccessKind::Store],
            Self::Modify => &[AccessKind::Load, AccessKind::Store],
            Self::Fetch => &[AccessKind::Fetch],
        }
    }
}

/// One memory operand, explicit or implied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand {
    pub(super) linear: u64,
    pub(super) size: u64,
    pub(super) touch: Touch,
    /// Whether the instruction names it; stack accesses, for one, are implied.
    pub(super) explicit: bool,
}

/// With whose rights an access is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rights {
    /// Those of the current privilege level.
    Current,
    /// The processor's own accesses to descriptors, the task state and an inner stack.
    System,
}

/// The vCPU, its memory, and the question which frames are forbidden.
pub(super) struct Probe<'a> {
    pub(super) cpu: Cpu,
    pub(super) source: &'a dyn Source,
    pub(super) view: &'a dyn GuestView,
    pub(super) forbidden: &'a mut dyn FnMut(Gfn, AccessKind) -> bool,
}

impl Probe<'_> {
    /// An access of `len` bytes at `linear`, of which the part in each page is translated and checked in turn.
    pub(super) fn touch(&mut self, linear: u64, len: u64, touch: Touch, rights: Rights) -> Step {
        let mut done = 0;
        while done < len {
            let at = self.clip(linear.wrapping_add(done), rights);
            let part = (PAGE - at % PAGE).min(len - done);
            let gpa = self.walk(at, touch, rights)?;
            self.physical(gpa, part, touch)?;
            done += part;
        }
        Ok(())
    }

    /// The processor's own accesses use all 64 bits of a table's base even while 32-bit code runs in long mode.
    fn clip(&self, linear: u64, rights: Rights) -> u64 {
        if rights == Rights::System && self.cpu.long() { linear } else { self.cpu.clip(linear) }
    }

    /// Ends the search if the frame of `gpa` is forbidden for this access.
    pub(super) fn physical(&mut self, gpa: u64, len: u64, touch: Touch) -> Step {
        let mut hit = None;
        for kind in touch.kinds() {
            hit = hit.or((self.forbidden)(Gfn::of_gpa(gpa), *kind).then_some(()));
        }
        match (hit, touch.kinds().last()) {
            (Some(()), Some(kind)) => {
                Err(Stop::Found(Access { gpa, size: u32::try_from(len).unwrap_or(u32::MAX), kind: *kind }))
            }
            _ => Ok(()),
        }
    }

    /// Loads `N` bytes, after the check of [`Self::touch`].
    pub(super) fn load<const N: usize>(&mut self, linear: u64, rights: Rights) -> Step<[u8; N]> {
        let mut bytes = [0; N];
        self.load_into(linear, &mut bytes, rights)?;
        Ok(bytes)
    }

    fn load_into(&mut self, linear: u64, buf: &mut [u8], rights: Rights) -> Step {
        let mut rest = buf;
        let mut at = linear;
        while !rest.is_empty() {
            at = self.clip(at, rights);
            let room = usize::try_from(PAGE - at % PAGE).unwrap_or(rest.len());
            let (part, tail) = rest.split_at_mut(room.min(rest.len()));
            let gpa = self.walk(at, Touch::Load, rights)?;
            self.physical(gpa, part.len() as u64, Touch::Load)?;
            self.read(gpa, part)?;
            at = at.wrapping_add(part.len() as u64);
            rest = tail;
        }
        Ok(())
    }

    /// Reads guest physical memory that has been checked.
    pub(super) fn read(&self, gpa: u64, buf: &mut [u8]) -> Step {
        self.view.read(gpa, buf).then_some(()).ok_or(Stop::Unknown)
    }

    pub(super) fn load_u16(&mut self, linear: u64, rights: Rights) -> Step<u16> {
        self.load(linear, rights).map(u16::from_le_bytes)
    }

    pub(super) fn load_u32(&mut self, linear: u64, rights: Rights) -> Step<u32> {
        self.load(linear, rights).map(u32::from_le_bytes)
    }

    pub(super) fn load_u64(&mut self, linear: u64, rights: Rights) -> Step<u64> {
        self.load(linear, rights).map(u64::from_le_bytes)
    }
}
