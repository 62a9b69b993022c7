//! From a seed to a sequence of operations. The generator keeps a rough picture of what its operations would have done,
//! only to aim well: it never sees a result, so the sequence is the same whatever runs it and whatever is left out.

use rand_core::{Rng as _, SeedableRng};
use rand_xorshift::XorShiftRng;

use crate::agent::{PAGE, WINDOW, WINDOW_LEN};
use crate::ops::{
    AREAS, Act, Area, Bad, Child, Discard, DupHow, FILES, FdRef, FileCall, Hex, Hva, Kind, MAPS, Op, Part, Resolve,
    SLOTS, Slot, VMS,
};
use crate::sys;

/// Which operations are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Surface {
    /// Everything, on VMs with private memory where the kernel has them.
    All,
    /// Files and memslots on default VMs, as Linux 7.3 has them; no private memory.
    File,
}

const GIB: u64 = 1 << 30;
const PAGES: u64 = WINDOW_LEN / PAGE;

#[derive(Clone, Copy)]
struct Extent {
    gpa: u64,
    size: u64,
}

#[derive(Clone, Copy, Default)]
struct VmPicture {
    live: bool,
    protected: bool,
    slots: [Option<Extent>; SLOTS],
}

#[derive(Clone, Copy, Default)]
struct FilePicture {
    vm: usize,
    size: u64,
}

/// The generator of one sequence.
pub(crate) struct Generator {
    rng: XorShiftRng,
    surface: Surface,
    vms: [VmPicture; VMS],
    files: [Option<FilePicture>; FILES],
    maps: [Option<u64>; MAPS],
}

/// The first `count` operations of a seed.
pub(crate) fn sequence(seed: u64, count: usize, surface: Surface) -> Vec<Op> {
    let mut generator = Generator {
        rng: XorShiftRng::seed_from_u64(seed),
        surface,
        vms: Default::default(),
        files: Default::default(),
        maps: Default::default(),
    };
    let mut ops = generator.prologue();
    while ops.len() < count {
        ops.push(generator.next());
    }
    ops.truncate(count);
    ops
}

impl Generator {
    fn below(&mut self, n: u64) -> u64 {
        self.rng.next_u64() % n.max(1)
    }

    fn index(&mut self, n: usize) -> usize {
        usize::try_from(self.below(n as u64)).unwrap_or(0)
    }

    fn percent(&mut self, p: u64) -> bool {
        self.below(100) < p
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.index(from.len())]
    }

    fn next(&mut self) -> Op {
        let all = self.surface == Surface::All;
        if self.vms.iter().all(|vm| !vm.live) && self.percent(60) {
            return self.vm_create();
        }
        match self.below(100) {
            0 => self.vm_create(),
            1 => self.vm_close(),
            2 => self.capability(),
            3 if all => self.enable_hypercalls(),
            3..=7 => self.file_create(),
            8 => self.file_close(),
            9 => self.file_dup(),
            10..=14 => self.file_call(),
            15..=22 => self.fallocate(),
            23 => self.file_map(),
            24..=28 if !all => {
                if self.percent(40) {
                    self.file_map()
                } else {
                    self.map_use()
                }
            }
            29..=40 => self.slot_set(),
            41..=44 => self.slot_delete(),
            45 => Op::DirtyLog { vm: self.vm(), slot: u32::try_from(self.below(SLOTS as u64)).unwrap_or(0) },
            46..=55 if all => self.attributes(),
            56..=59 => self.prefault(),
            60 => Op::BadPointer {
                vm: self.vm(),
                call: self.pick(&[Bad::CreateGmem, Bad::Region, Bad::Region2, Bad::Attributes, Bad::PreFault]),
            },
            61 => self.fork(),
            62..=68 => self.host_read(),
            69..=74 => self.host_write(),
            75 => self.host_discard(),
            _ => self.guest(),
        }
    }

    /// A world worth disturbing: a VM with three slots, two of them of one file, the first half of the window private.
    fn prologue(&mut self) -> Vec<Op> {
        let all = self.surface == Surface::All;
        let mut ops = vec![Op::VmCreate { vm: 0, kind: Kind::Tested, hypercalls: all }];
        self.vms[0] = VmPicture { live: true, protected: all, ..Default::default() };
        for file in 0..2 {
            let flags = if self.surface == Surface::File { self.pick(&[0, 1, 3, 3]) } else { 0 };
            ops.push(Op::FileCreate { vm: 0, file, size: Hex(4 << 20), flags: Hex(flags), reserved: 0 });
            self.files[file] = Some(FilePicture { vm: 0, size: 4 << 20 });
        }
        for (id, file) in [Some(0), Some(0), Some(1), None].into_iter().enumerate() {
            let at = id as u64 * (2 << 20);
            let size = self.pick(&[64 * PAGE, 2 << 20, 1 << 20]);
            let slot = Slot {
                v1: false,
                slot: Hex(id as u64),
                flags: Hex(u64::from(file.map_or(0, |_| sys::KVM_MEM_GUEST_MEMFD))),
                gpa: Hex(WINDOW + at),
                size: Hex(size),
                hva: Hva::In(self.area(), Hex(at)),
                fd: file.map_or(FdRef::None, FdRef::File),
                offset: Hex(if id == 1 { 2 << 20 } else { 0 }),
                pad: 0,
            };
            self.vms[0].slots[id] = Some(Extent { gpa: WINDOW + at, size });
            ops.push(Op::SlotSet { vm: 0, slot });
        }
        if self.surface == Surface::All {
            let half = Hex(WINDOW_LEN / 2);
            ops.push(Op::Attributes { vm: 0, gpa: Hex(WINDOW), size: half, attributes: Hex(8), flags: Hex(0) });
        }
        ops
    }

    fn vm(&mut self) -> usize {
        let live: Vec<usize> = (0..VMS).filter(|&vm| self.vms[vm].live).collect();
        if live.is_empty() || self.percent(3) { self.index(VMS) } else { self.pick(&live) }
    }

    fn file(&mut self) -> usize {
        let live: Vec<usize> = (0..FILES).filter(|&file| self.files[file].is_some()).collect();
        if live.is_empty() || self.percent(5) { self.index(FILES) } else { self.pick(&live) }
    }

    fn file_of(&mut self, vm: usize) -> usize {
        let own: Vec<usize> = (0..FILES).filter(|&file| self.files[file].is_some_and(|f| f.vm == vm)).collect();
        if own.is_empty() || self.percent(8) { self.file() } else { self.pick(&own) }
    }

    fn area(&mut self) -> Area {
        match self.below(40) {
            0 => Area::ReadOnly,
            1 => Area::NoAccess,
            2..=9 => Area::SharedAnonymous,
            10..=19 => Area::Memfd,
            _ => Area::Anonymous,
        }
    }

    /// A byte offset in the window, page aligned; sometimes a round one.
    fn page_offset(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(WINDOW_LEN >> 21) << 21,
            1..=3 => self.below(PAGES / 64) * 64 * PAGE,
            _ => self.below(PAGES) * PAGE,
        }
    }

    fn pages(&mut self) -> u64 {
        match self.below(10) {
            0 => 512,
            1 => 1 + self.below(512),
            2..=4 => 64,
            5..=6 => 1,
            _ => 1 + self.below(64),
        }
    }

    /// A page that is likely in a slot.
    fn page(&mut self, vm: usize) -> u64 {
        let slots: Vec<Extent> = self.vms[vm].slots.iter().flatten().copied().collect();
        if slots.is_empty() || self.percent(10) {
            return WINDOW + self.page_offset();
        }
        let slot = self.pick(&slots);
        let pages = slot.size / PAGE;
        // A few pages are met again and again, or nothing written would ever be read.
        let page = match self.below(10) {
            0..=3 => 0,
            4..=5 => pages.saturating_sub(1),
            6..=8 => self.below(pages.min(3)),
            _ => self.below(pages),
        };
        slot.gpa + page * PAGE
    }

    fn vm_create(&mut self) -> Op {
        let vm = (0..VMS).find(|&vm| !self.vms[vm].live).unwrap_or(VMS - 1);
        let kind = match self.below(10) {
            0 => Kind::Raw(Hex(self.pick(&[7, 99, 1 << 31, 1 << 40]))),
            1..=2 => Kind::Default,
            _ => Kind::Tested,
        };
        if !matches!(kind, Kind::Raw(_)) {
            self.vms[vm] = VmPicture {
                live: true,
                protected: kind == Kind::Tested && self.surface == Surface::All,
                ..Default::default()
            };
        }
        let hypercalls = self.percent(80) && self.surface == Surface::All;
        Op::VmCreate { vm, kind, hypercalls }
    }

    fn vm_close(&mut self) -> Op {
        let vm = self.vm();
        let part = self.pick(&[Part::All, Part::All, Part::VmFd, Part::Vcpu]);
        self.vms[vm].live = false;
        Op::VmClose { vm, part }
    }

    fn capability(&mut self) -> Op {
        let cap = self.pick(&[201, 231, 232, 233, 234, 235, 236, 244, 10, 9999]);
        let scope = if self.percent(40) { FdRef::Kvm } else { FdRef::Vm(self.vm()) };
        Op::Capability { scope, cap }
    }

    fn enable_hypercalls(&mut self) -> Op {
        Op::EnableHypercalls { vm: self.vm(), bits: Hex(self.pick(&[0, 1 << 12, 1 << 12, 1, (1 << 12) | 2, 1 << 40])) }
    }

    fn file_create(&mut self) -> Op {
        let vm = self.vm();
        let file = (0..FILES).find(|&file| self.files[file].is_none()).unwrap_or_else(|| self.index(FILES));
        let size = match self.below(20) {
            0 => 0,
            1 => self.pick(&[1, PAGE - 1, PAGE + 1, 1 << 63, u64::MAX, (1 << 63) | PAGE]),
            2 => self.pick(&[64 << 40, (1 << 63) - PAGE]),
            3..=9 => self.pages() * PAGE,
            _ => self.pick(&[2 << 20, 4 << 20]),
        };
        let flags = match (self.surface, self.below(20)) {
            (_, 0) => 1 << self.below(64),
            (Surface::File, 1..=15) => self.pick(&[1, 3, 3, 3, 2]),
            (Surface::All, 1..=2) => self.pick(&[1, 2, 3]),
            _ => 0,
        };
        if size != 0 && size % PAGE == 0 && size < 1 << 63 && (flags == 0 || self.surface == Surface::File) {
            self.files[file] = Some(FilePicture { vm, size });
        }
        Op::FileCreate { vm, file, size: Hex(size), flags: Hex(flags), reserved: u64::from(self.percent(10)) }
    }

    fn file_close(&mut self) -> Op {
        let file = self.file();
        self.files[file] = None;
        Op::FileClose { file }
    }

    fn file_dup(&mut self) -> Op {
        let (from, to) = (self.file(), self.index(FILES));
        self.files[to] = self.files[from];
        Op::FileDup { from, to, how: self.pick(&[DupHow::Dup, DupHow::DupFd, DupHow::DupFdCloexec, DupHow::Dup3]) }
    }

    fn file_call(&mut self) -> Op {
        use FileCall as C;
        let file = self.file();
        let size = self.files[file].map_or(0, |f| f.size);
        let truncate = self.pick(&[0, PAGE, size, size + PAGE, 1, 1 << 63]);
        let whence = self.pick(&[0, 1, 2, 3, 4, 9]);
        let nr = self.pick(&[sys::KVM_CREATE_GUEST_MEMFD, sys::KVM_RUN, sys::KVM_CHECK_EXTENSION, 0x1234]);
        let call = self.pick(&[
            C::Fstat,
            C::Fstat,
            C::Statx,
            C::Read(8),
            C::Read(0),
            C::Write(8),
            C::Write(0),
            C::Pread,
            C::Pwrite,
            C::Readv,
            C::Writev,
            C::Preadv,
            C::Pwritev,
            C::Lseek(whence),
            C::Ftruncate(Hex(truncate)),
            C::Fsync,
            C::Fdatasync,
            C::Fchmod,
            C::Futimens,
            C::GetFd,
            C::GetFl,
            C::ReOpen,
            C::Name,
            C::Ioctl(Hex(nr)),
            C::Poll,
            C::SendfileFrom,
            C::SendfileTo,
            C::SpliceFrom,
            C::SpliceTo,
            C::CopyRangeFrom,
            C::CopyRangeTo,
            C::GetSeals,
            C::AddSeals,
        ]);
        Op::FileCall { file, call }
    }

    fn fallocate(&mut self) -> Op {
        let file = self.file();
        let pages = self.files[file].map_or(1, |f| f.size / PAGE).max(1);
        let first = match self.below(4) {
            0 => 0,
            1 => self.below(pages.min(3)),
            2 => self.below(pages.min(1024)),
            _ => self.below(pages),
        };
        let mut offset = first * PAGE;
        let mut len = self.pages() * PAGE;
        if self.percent(85) {
            len = len.min((pages - first) * PAGE);
        }
        match self.below(20) {
            0 => offset += self.pick(&[1, 512, PAGE / 2]),
            1 => len += self.pick(&[1, 512, PAGE - 1]),
            2 => offset = self.pick(&[pages * PAGE, (pages + 8) * PAGE, 1 << 63, (1 << 63) - PAGE, (1 << 62)]),
            3 => len = self.pick(&[0, 1 << 63, (1 << 63) - PAGE]),
            _ => {}
        }
        let mode = match self.below(30) {
            0..=11 => 1,
            12..=27 => 3,
            28 => 0,
            _ => self.pick(&[2, 8, 9, 16, 17, 32, 64, 65, 128, 1 << 20]),
        };
        // Only a punch may have a length that would otherwise really be allocated.
        if mode == 1 && len < 1 << 63 {
            len = len.min(4 << 20);
        }
        Op::Fallocate { file, mode: Hex(mode), offset: Hex(offset), len: Hex(len) }
    }

    fn file_map(&mut self) -> Op {
        let map = self.index(MAPS);
        if self.maps[map].is_some() && self.percent(60) {
            self.maps[map] = None;
            return Op::FileUnmap { map };
        }
        let file = self.file();
        let size = self.files[file].map_or(PAGE, |f| f.size).min(4 << 20);
        let offset = if self.percent(70) { 0 } else { self.below(size / PAGE + 2) * PAGE };
        let len = if self.percent(70) { size } else { size + PAGE * self.below(4) };
        self.maps[map] = Some(len);
        let (shared, write) = (self.percent(85), self.percent(85));
        Op::FileMap { map, file, offset: Hex(offset), len: Hex(len), shared, write }
    }

    fn map_use(&mut self) -> Op {
        let live: Vec<usize> = (0..MAPS).filter(|&map| self.maps[map].is_some()).collect();
        let map = if live.is_empty() { 0 } else { self.pick(&live) };
        let pages = self.maps[map].unwrap_or(PAGE) / PAGE;
        let offset = Hex(self.below(pages) * PAGE + 8 * self.below(PAGE / 8));
        match self.below(5) {
            0..=1 => Op::MapRead { map, offset },
            2..=3 => Op::MapWrite { map, offset, value: self.byte() },
            _ => Op::MapTouch { map, offset },
        }
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(1 + self.below(255)).unwrap_or(1)
    }

    fn slot_id(&mut self, vm: usize) -> usize {
        let free: Vec<usize> = (0..SLOTS).filter(|&id| self.vms[vm].slots[id].is_none()).collect();
        if free.is_empty() || self.percent(15) { self.index(SLOTS) } else { self.pick(&free) }
    }

    fn slot_set(&mut self) -> Op {
        let vm = self.vm();
        let id = self.slot_id(vm);
        let at = self.page_offset();
        let mut size = (self.pages() * PAGE).min(WINDOW_LEN - at);
        let hva_at = if self.percent(70) { at } else { self.page_offset().min(WINDOW_LEN - size) };
        let private = self.percent(70);
        let file = self.file_of(vm);
        let file_size = self.files[file].map_or(0, |f| f.size);
        if private && self.percent(90) && file_size > 0 {
            size = size.min(file_size);
        }
        let room = file_size.saturating_sub(size).min(1 << 30) / PAGE + 1;
        let offset = if self.percent(50) { 0 } else { self.below(room) * PAGE };
        let flags = if private { sys::KVM_MEM_GUEST_MEMFD } else { self.pick(&[0, 0, 1, 2]) };
        let mut slot = Slot {
            v1: !private && self.percent(50),
            slot: Hex(id as u64),
            flags: Hex(u64::from(flags)),
            gpa: Hex(WINDOW + at),
            size: Hex(size),
            hva: Hva::In(self.area(), Hex(hva_at)),
            fd: if private { FdRef::File(file) } else { FdRef::None },
            offset: Hex(if private { offset } else { 0 }),
            pad: u32::from(self.percent(5)),
        };
        if self.percent(25) {
            self.spoil(&mut slot);
        } else if !self.overlaps(vm, id, at + WINDOW, size) {
            self.vms[vm].slots[id] = Some(Extent { gpa: WINDOW + at, size });
        }
        Op::SlotSet { vm, slot }
    }

    fn overlaps(&self, vm: usize, id: usize, gpa: u64, size: u64) -> bool {
        let clash = |e: &Extent| e.gpa < gpa + size && gpa < e.gpa + e.size;
        self.vms[vm].slots[id].is_some() || self.vms[vm].slots.iter().flatten().any(clash)
    }

    fn spoil(&mut self, slot: &mut Slot) {
        match self.below(16) {
            0 => slot.flags = Hex(1 << self.below(32)),
            1 => slot.flags = Hex(slot.flags.0 | self.pick(&[1, 2, 3])),
            2 => slot.gpa.0 += self.pick(&[1, 512, PAGE - 1]),
            3 => slot.size.0 += self.pick(&[1, 512, PAGE - 1]),
            4 => slot.hva = Hva::Raw(Hex(self.pick(&[0, 1 << 47, (1 << 47) - PAGE, u64::MAX - PAGE + 1, 0x1001]))),
            5 => slot.offset = Hex(slot.offset.0 + self.pick(&[1, 512, PAGE - 1])),
            6 => slot.offset = Hex(self.pick(&[1 << 63, (1 << 63) - PAGE, u64::MAX - PAGE + 1, 4 << 20, 1 << 62])),
            7..=8 => slot.fd = self.pick(&[FdRef::Kvm, FdRef::Vm(0), FdRef::Vm(1), FdRef::Memfd, FdRef::None]),
            9 => slot.slot = Hex(self.pick(&[32763, 32764, 32767, 0xffff, 0x1_0000, 0x1_0005, 0x2_0000])),
            // Whether bound pages or frames out of reach are found out first is not the same in 7.3 and in its release
            // candidates, of which the kernel that one compares with may be one.
            10 if self.surface == Surface::File && slot.flags.0 & u64::from(sys::KVM_MEM_GUEST_MEMFD) != 0 => {
                slot.gpa = Hex(self.pick(&[0, u64::MAX - PAGE + 1]));
            }
            10 => slot.gpa = Hex(self.pick(&[0, 1 << 52, u64::MAX - PAGE + 1, 1 << 40])),
            11 => slot.size = Hex(self.pick(&[1 << 44, 1 << 43, u64::MAX - PAGE + 1, (1 << 43) - PAGE])),
            12 => slot.v1 = true,
            13 => slot.fd = FdRef::File(self.file()),
            14 => slot.pad = 7,
            _ => slot.slot = Hex(self.below(SLOTS as u64)),
        }
    }

    fn slot_delete(&mut self) -> Op {
        let vm = self.vm();
        let used: Vec<usize> = (0..SLOTS).filter(|&id| self.vms[vm].slots[id].is_some()).collect();
        let id = if used.is_empty() || self.percent(10) { self.index(SLOTS) } else { self.pick(&used) };
        let rubbish = self.percent(25);
        let flags = if self.percent(5) { 1 << 4 } else { self.pick(&[0, 0, 4]) };
        if flags != 1 << 4 {
            self.vms[vm].slots[id] = None;
        }
        let slot = Slot {
            v1: flags == 0 && self.percent(30),
            slot: Hex(id as u64),
            flags: Hex(flags),
            gpa: Hex(if rubbish { self.page_offset() } else { 0 }),
            size: Hex(0),
            hva: Hva::Raw(Hex(0)),
            fd: if rubbish { FdRef::Memfd } else { FdRef::None },
            offset: Hex(if rubbish { self.page_offset() } else { 0 }),
            pad: 0,
        };
        Op::SlotDelete { vm, slot }
    }

    fn attributes(&mut self) -> Op {
        let vm = self.vm();
        let mut gpa = if self.percent(70) { self.page(vm) } else { WINDOW + self.page_offset() };
        let mut size = (self.pages() * PAGE).min(WINDOW + WINDOW_LEN - gpa);
        let mut attributes = if self.percent(60) { 8 } else { 0 };
        let mut flags = 0;
        match self.below(30) {
            0 => gpa += self.pick(&[1, 512]),
            1 => size += self.pick(&[1, 512]),
            2 => size = 0,
            3 => attributes = 1 << self.below(64),
            4 => flags = 1 << self.below(64),
            5 => (gpa, size) = (u64::MAX - PAGE + 1, PAGE),
            6 => (gpa, size) = (u64::MAX - 2 * PAGE + 1, PAGE),
            7 => (gpa, size) = (self.pick(&[1 << 45, 64 * GIB]), 4 * PAGE),
            8 => attributes |= 7,
            _ => {}
        }
        Op::Attributes { vm, gpa: Hex(gpa), size: Hex(size), attributes: Hex(attributes), flags: Hex(flags) }
    }

    fn prefault(&mut self) -> Op {
        let vm = self.vm();
        let mut gpa = self.page(vm);
        let mut size = self.pages() * PAGE;
        let mut flags = 0;
        match self.below(20) {
            0 => gpa += self.pick(&[1, 512]),
            1 => size += self.pick(&[1, 512]),
            2 => size = 0,
            3 => flags = 1 << self.below(64),
            4 => (gpa, size) = (u64::MAX - PAGE + 1, PAGE),
            5 => gpa = WINDOW + WINDOW_LEN + self.page_offset(),
            _ => {}
        }
        let padding = u64::from(self.percent(10));
        Op::PreFault { vm, gpa: Hex(gpa), size: Hex(size), flags: Hex(flags), padding }
    }

    fn fork(&mut self) -> Op {
        let children = [Child::Attributes, Child::CreateGmem, Child::Allocate, Child::Punch, Child::Fstat, Child::Run];
        Op::Fork { vm: self.vm(), file: self.file(), child: self.pick(&children) }
    }

    fn host_read(&mut self) -> Op {
        let area = self.pick(&AREAS[..4]);
        let (vm, offset) = self.host_place();
        Op::HostRead { vm, area, offset: Hex(offset), len: self.pick(&[8, PAGE, 64, 2 * PAGE]) }
    }

    fn host_write(&mut self) -> Op {
        let area = self.pick(&AREAS[..3]);
        let (vm, offset) = self.host_place();
        let (len, value) = (self.pick(&[8, PAGE, 64, 2 * PAGE]), self.byte());
        Op::HostWrite { vm, area, offset: Hex(offset), len, value }
    }

    fn host_place(&mut self) -> (usize, u64) {
        let vm = self.vm();
        let offset = self.page(vm).saturating_sub(WINDOW).min(WINDOW_LEN - 2 * PAGE);
        (vm, offset)
    }

    fn host_discard(&mut self) -> Op {
        let area = self.pick(&AREAS[..3]);
        let (vm, offset) = self.host_place();
        let len = Hex((self.pages() * PAGE).min(WINDOW_LEN - offset));
        // MADV_FREE leaves open when the pages go, so it is only used where it is refused.
        let how = match area {
            Area::Anonymous => Discard::DontNeed,
            _ => self.pick(&[Discard::DontNeed, Discard::Remove, Discard::Free]),
        };
        Op::HostDiscard { vm, area, offset: Hex(offset), len, how }
    }

    fn guest(&mut self) -> Op {
        let vm = self.vm();
        let act = self.act(vm);
        let resolve = match (self.surface, self.below(10)) {
            (_, 0..=2) => Resolve::Reset,
            (Surface::All, 3..=6) => Resolve::Flip,
            (_, 3..=7) => Resolve::Again,
            _ => Resolve::Rebind(self.file_of(vm)),
        };
        Op::Guest { vm, act, resolve }
    }

    fn act(&mut self, vm: usize) -> Act {
        let page = self.page(vm);
        let log2 = self.below(4);
        let alias = self.percent(25);
        let in_page = if self.percent(60) { self.pick(&[0, 8, PAGE - 8]) } else { self.below(PAGE >> log2) << log2 };
        let crossing = log2 > 0 && self.percent(6);
        let gpa = if crossing { page + PAGE - (1 << (log2 - 1)) } else { page + in_page };
        let gpa = Hex(gpa.min(WINDOW + WINDOW_LEN - 8));
        let value = Hex(self.rng.next_u64());
        let words = self.pick(&[1, 2, 16, 512, 513, 1024]);
        match self.below(if self.vms[vm].protected { 28 } else { 24 }) {
            0..=8 => Act::Load { gpa, log2, alias },
            9..=16 => Act::Store { gpa, log2, value, alias },
            17 => Act::Xadd { gpa: Hex(page + (in_page & !7)), value, alias },
            18..=19 => Act::Fill { gpa: Hex(page), words: self.fit(page, words), value },
            20 => {
                let to = self.page(vm);
                let words = self.fit(page, words).min(self.fit(to, words));
                Act::Copy { from: Hex(page), to: Hex(to), words }
            }
            21..=22 => Act::Sum { gpa: Hex(page), words: self.fit(page, words) },
            23 => Act::Fetch { gpa: Hex(page + (in_page & !7)) },
            _ => self.hypercall(page),
        }
    }

    /// So many quadwords, but not beyond the window.
    fn fit(&self, gpa: u64, words: u64) -> u64 {
        words.min((WINDOW + WINDOW_LEN).saturating_sub(gpa) / 8)
    }

    fn hypercall(&mut self, page: u64) -> Act {
        let mut gpa = page;
        let mut pages = self.pages().min((WINDOW + WINDOW_LEN - page) / PAGE);
        let mut attributes = if self.percent(50) { sys::MAP_GPA_RANGE_ENCRYPTED } else { 0 };
        match self.below(12) {
            0 => gpa += 1,
            1 => pages = 0,
            2 => pages = u64::MAX / PAGE,
            3 => attributes |= 1,
            4 => attributes |= 1 << 40,
            5 => gpa = 1 << 45,
            _ => {}
        }
        let answers = [0, 22, 11, 5, u64::MAX - 21];
        let answer = self.percent(15).then(|| Hex(self.pick(&answers)));
        Act::Hypercall { gpa: Hex(gpa), pages: Hex(pages), attributes: Hex(attributes), answer }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_means_one_sequence_and_a_shorter_one_is_its_beginning() {
        let long = sequence(7, 400, Surface::All);
        assert_eq!(long, sequence(7, 400, Surface::All));
        assert_eq!(long[..150], sequence(7, 150, Surface::All)[..]);
        assert_ne!(long, sequence(8, 400, Surface::All));
    }

    #[test]
    fn the_file_surface_has_no_private_memory() {
        for seed in 0..20 {
            for op in sequence(seed, 300, Surface::File) {
                assert!(!matches!(op, Op::Attributes { .. } | Op::EnableHypercalls { .. }), "{op:?}");
                assert!(!matches!(op, Op::Guest { act: Act::Hypercall { .. }, .. }), "{op:?}");
            }
        }
    }

    #[test]
    fn what_is_really_allocated_or_touched_stays_small() {
        for op in (0..50).flat_map(|seed| sequence(seed, 500, Surface::All)) {
            match op {
                Op::Fallocate { mode: Hex(1), len, .. } => assert!(len.0 <= 4 << 20 || len.0 >= 1 << 63, "{op:?}"),
                Op::Guest { act: Act::Fill { gpa, words, .. } | Act::Sum { gpa, words }, .. } => {
                    assert!(gpa.0 >= WINDOW && gpa.0 + words * 8 <= WINDOW + WINDOW_LEN, "{op:?}");
                }
                Op::HostWrite { offset, len, .. } | Op::HostRead { offset, len, .. } => {
                    assert!(offset.0 + len <= WINDOW_LEN, "{op:?}");
                }
                _ => {}
            }
        }
    }
}
