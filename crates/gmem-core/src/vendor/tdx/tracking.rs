//! TLB tracking: how the module knows that no vCPU can still use a translation that the host has blocked.
//!
//! Time in a TD is counted in epochs. A vCPU belongs to the epoch in which it entered; TDH.MEM.TRACK starts the next
//! epoch once nobody is left in the one before the current. A page blocked in epoch `b` is safe when every vCPU of `b`
//! has left: epochs older than the previous one are empty by construction, the previous one is when its count is zero.

use alloc::vec::Vec;

/// Epoch, reference counts and vCPUs of a TD.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Tracking {
    epoch: u64,
    references: [u16; 2],
    vcpus: Vec<Option<u64>>,
}

/// A vCPU was entered that is inside, left that is outside, or does not exist.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VcpuError(pub u16);

impl Tracking {
    pub(super) fn new(vcpus: u16) -> Self {
        Self { epoch: 1, references: [0; 2], vcpus: alloc::vec![None; usize::from(vcpus)] }
    }

    /// The current epoch: TDCS.TD_EPOCH, 1 at first.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// vCPUs inside that entered in an even and in an odd epoch.
    #[must_use]
    pub fn references(&self) -> [u16; 2] {
        self.references
    }

    /// Number of vCPUs, inside or outside.
    #[must_use]
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// Whether a page that was blocked in epoch `bepoch` is out of every TLB.
    #[must_use]
    pub fn is_tracked(&self, bepoch: u64) -> bool {
        let previous = self.epoch.wrapping_sub(1);
        bepoch < previous || bepoch == previous && self.references[parity(bepoch)] == 0
    }

    /// Starts the next epoch, or returns false while a vCPU of the previous one is inside.
    pub(super) fn advance(&mut self) -> bool {
        let free = self.references[parity(self.epoch.wrapping_sub(1))] == 0;
        if free {
            self.epoch = self.epoch.wrapping_add(1);
        }
        free
    }

    pub(super) fn enter(&mut self, vcpu: u16) -> Result<(), VcpuError> {
        let epoch = self.epoch;
        match self.vcpus.get_mut(usize::from(vcpu)) {
            Some(inside @ None) => {
                *inside = Some(epoch);
                self.references[parity(epoch)] += 1;
                Ok(())
            }
            _ => Err(VcpuError(vcpu)),
        }
    }

    pub(super) fn exit(&mut self, vcpu: u16) -> Result<(), VcpuError> {
        let left = self.vcpus.get_mut(usize::from(vcpu)).and_then(Option::take).ok_or(VcpuError(vcpu))?;
        self.references[parity(left)] -= 1;
        Ok(())
    }

    /// Every vCPU that is inside leaves and enters again, as after an IPI.
    pub(super) fn kick(&mut self) {
        self.references = [0; 2];
        for epoch in self.vcpus.iter_mut().flatten() {
            *epoch = self.epoch;
            self.references[parity(self.epoch)] += 1;
        }
    }

    /// Whether any vCPU is inside.
    #[must_use]
    pub fn any_inside(&self) -> bool {
        self.vcpus.iter().any(Option::is_some)
    }

    pub(super) fn set_vcpus(&mut self, vcpus: u16) {
        *self = Self { epoch: self.epoch, ..Self::new(vcpus) };
    }
}

fn parity(epoch: u64) -> usize {
    usize::from(epoch & 1 == 1)
}
