//! Memory of gmem's own, which owes nothing to the client's `malloc`.
//!
//! `malloc` would make system calls from libc's text, which a client's seccomp filter may end the process for; and a signal
//! handler that interrupts its thread inside `malloc` would wait for that thread's own lock when its ioctl comes to gmem.
//!
//! So nobody waits here for a lock. There are several heaps: who finds one taken goes to the next, and who finds all of them
//! taken for long maps a block for itself. A block goes back to the heap that it came from; if that is taken, the block is put
//! on a list that the next one to take the heap empties. A heap that is never given back, because a handler left by `longjmp`
//! or because its owner is a thread that a child of fork does not have, is a loss of memory and of nothing else.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::hint::spin_loop;
use core::ptr::{self, null_mut, without_provenance_mut};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use dlmalloc::Dlmalloc;
use rustix::mm::{Advice, MapFlags, ProtFlags};

#[global_allocator]
static ALLOCATOR: Heaps = Heaps([const { Heap::new() }; HEAPS]);

const HEAPS: usize = 4;
/// In place of a heap's number: the block is a mapping of its own.
const MAPPED: usize = HEAPS;
const PAGE: usize = 4096;
/// What a heap grows by, so that gmem has few mappings: a process may have only so many.
const STEP: usize = 256 << 10;
/// What a heap grows by when the reserve is used up: a huge page, where the host has those. Page state that is looked up at
/// random is found in fewer steps there.
const HUGE: usize = 2 << 20;
/// Blocks from this size on are mappings of their own: absent until they are used, and gone when they are freed.
const LARGE: usize = 1 << 20;
/// How often all heaps are tried before a block becomes a mapping: some 100 microseconds.
const PATIENCE: usize = 1000;
/// How often a fork waits for the owner of a heap.
const FORK_PATIENCE: usize = 1000;

/// In front of every block.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Header {
    /// The number of the block's heap; on a list of freed blocks the next one.
    heap_or_next: *mut Header,
    /// From the start of what the heap gave, or the kernel, to the block.
    offset: usize,
}

const HEADER: usize = size_of::<Header>();

/// Bytes to ask for so that a header and a block fit, however the memory is aligned to 16.
fn with_header(layout: Layout) -> Option<usize> {
    layout.size().checked_add(layout.align().max(HEADER))
}

/// Makes a block of memory that was asked for with [`with_header`].
///
/// # Safety
/// `base` is aligned to 16, and the memory is the caller's.
unsafe fn place(base: *mut u8, align: usize, heap: usize) -> *mut u8 {
    // The block starts within the first `align` bytes, since both are aligned to 16.
    let offset = HEADER + base.wrapping_add(HEADER).align_offset(align.max(HEADER));
    let block = base.wrapping_add(offset);
    let header = Header { heap_or_next: without_provenance_mut(heap), offset };
    // SAFETY: `HEADER` bytes or more lie between the start of the memory and the block, which is aligned to 16.
    unsafe { header_of(block).write(header) };
    block
}

fn header_of(block: *mut u8) -> *mut Header {
    block.wrapping_sub(HEADER).cast()
}

/// A heap that one thread at a time uses, and that nobody waits for.
struct Heap {
    taken: AtomicBool,
    /// Headers of blocks that were freed while it was taken.
    freed: AtomicPtr<Header>,
    memory: UnsafeCell<Dlmalloc<Pages>>,
}

// SAFETY: `memory` is used by the one who has set `taken`; the rest is atomic.
unsafe impl Sync for Heap {}

impl Heap {
    const fn new() -> Self {
        let mut memory = Dlmalloc::new_with_allocator(Pages);
        assert!(memory.set_granularity(STEP));
        Self { taken: AtomicBool::new(false), freed: AtomicPtr::new(null_mut()), memory: UnsafeCell::new(memory) }
    }

    fn take(&self) -> bool {
        !self.taken.load(Ordering::Relaxed) && !self.taken.swap(true, Ordering::Acquire)
    }

    fn give_back(&self) {
        self.taken.store(false, Ordering::Release);
    }

    /// Uses the heap, unless someone else does.
    fn with<T>(&self, use_it: impl FnOnce(&mut Dlmalloc<Pages>) -> T) -> Option<T> {
        if !self.take() {
            return None;
        }
        // SAFETY: it is this thread that has taken the heap, and it does not come here again before it is given back: a
        // signal handler in between finds it taken.
        let memory = unsafe { &mut *self.memory.get() };
        if !self.freed.load(Ordering::Relaxed).is_null() {
            self.empty(memory);
        }
        let result = use_it(memory);
        self.give_back();
        Some(result)
    }

    fn empty(&self, memory: &mut Dlmalloc<Pages>) {
        let mut next = self.freed.swap(null_mut(), Ordering::Acquire);
        while !next.is_null() {
            // SAFETY: a header on the list is that of a block which nobody uses any more, and the list was taken as a whole.
            unsafe {
                let header = next.read();
                memory.c_free(next.cast::<u8>().wrapping_add(HEADER).wrapping_sub(header.offset));
                next = header.heap_or_next;
            }
        }
    }

    /// # Safety
    /// The block is one of this heap's, and nobody uses it any more.
    unsafe fn free(&self, block: *mut u8) {
        let header = header_of(block);
        let done = self.with(|memory| {
            // SAFETY: `offset` leads to what the heap gave.
            unsafe { memory.c_free(block.wrapping_sub((*header).offset)) }
        });
        if done.is_none() {
            let mut first = self.freed.load(Ordering::Relaxed);
            loop {
                // SAFETY: nobody else has the block until it is on the list.
                unsafe { (*header).heap_or_next = first };
                match self.freed.compare_exchange_weak(first, header, Ordering::Release, Ordering::Relaxed) {
                    Ok(_) => return,
                    Err(now) => first = now,
                }
            }
        }
    }
}

struct Heaps([Heap; HEAPS]);

impl Heaps {
    fn on_a_heap(&self, layout: Layout, size: usize) -> Option<*mut u8> {
        for round in 0.. {
            let mut full = 0;
            for (number, heap) in self.0.iter().enumerate() {
                // SAFETY: any size may be asked for.
                match heap.with(|memory| unsafe { memory.c_malloc(size) }) {
                    None => {}
                    Some(base) if base.is_null() => full += 1,
                    // SAFETY: the heap gave this much, aligned to 16.
                    Some(base) => return Some(unsafe { place(base, layout.align(), number) }),
                }
            }
            if full == HEAPS || round == PATIENCE {
                break;
            }
            spin_loop();
        }
        None
    }
}

fn mapped_len(size: usize) -> Option<usize> {
    size.checked_next_multiple_of(PAGE)
}

fn mapped(layout: Layout, size: usize) -> Option<*mut u8> {
    let base = map(mapped_len(size)?)?;
    // SAFETY: a page is aligned to 16, and the memory was mapped a moment ago.
    Some(unsafe { place(base, layout.align(), MAPPED) })
}

// SAFETY: blocks lie in memory that a heap or the kernel has just given, are as large and as aligned as asked for, and stay
// until they are freed. Nothing here unwinds.
unsafe impl GlobalAlloc for Heaps {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(size) = with_header(layout) else { return null_mut() };
        let first = if size < LARGE { self.on_a_heap(layout, size) } else { mapped(layout, size) };
        let block = first.or_else(|| if size < LARGE { mapped(layout, size) } else { self.on_a_heap(layout, size) });
        block.unwrap_or(null_mut())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: of the caller.
        let block = unsafe { self.alloc(layout) };
        // SAFETY: a block of this size was given a moment ago, with a header.
        unsafe {
            if !block.is_null() && (*header_of(block)).heap_or_next.addr() != MAPPED {
                block.write_bytes(0, layout.size());
            }
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: every block has a header, which is the allocator's alone.
        let header = unsafe { header_of(block).read() };
        match self.0.get(header.heap_or_next.addr()) {
            // SAFETY: the heap that gave the block; the caller does not use it any more.
            Some(heap) => unsafe { heap.free(block) },
            None => {
                let len = with_header(layout).and_then(mapped_len).unwrap_or(0);
                // SAFETY: the mapping that was made for this block.
                unsafe { unmap(block.wrapping_sub(header.offset), len) };
            }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's size is not larger than `isize::MAX` when it is rounded up to the alignment.
        let new = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        let (Some(old_len), Some(new_len)) = (with_header(layout), with_header(new)) else { return null_mut() };
        // SAFETY: as in `dealloc`.
        let header = unsafe { header_of(block).read() };
        let in_place = match self.0.get(header.heap_or_next.addr()) {
            None => (mapped_len(old_len) == mapped_len(new_len)).then_some(block),
            Some(heap) if layout.align() <= HEADER && new_len < LARGE => {
                let base = block.wrapping_sub(HEADER);
                // SAFETY: what the heap gave, which starts with the header as long as the alignment is the heap's own.
                let moved = heap.with(|memory| unsafe { memory.c_realloc(base, new_len) });
                moved.filter(|base| !base.is_null()).map(|base| base.wrapping_add(HEADER))
            }
            Some(_) => None,
        };
        in_place.unwrap_or_else(|| {
            // SAFETY: the caller gives up the old block for a new one; both are as large as what is copied.
            unsafe {
                let copy = self.alloc(new);
                if !copy.is_null() {
                    ptr::copy_nonoverlapping(block, copy, layout.size().min(new_size));
                    self.dealloc(block, layout);
                }
                copy
            }
        })
    }
}

/// Heaps that a thread has taken for a fork; given back in the parent and in the child.
pub(crate) struct Taken([bool; HEAPS]);

/// Takes the heaps, so that a child of fork finds none of them in the middle of a change by a thread that it does not have.
///
/// A heap that cannot be had is one that this thread itself uses below a signal handler, and goes on using in the child, or
/// one whose owner does not run; the child does without that one.
pub(crate) fn take_all() -> Taken {
    let take = |heap: &Heap| {
        (0..FORK_PATIENCE).any(|_| {
            let taken = heap.take();
            if !taken {
                rustix::thread::sched_yield();
            }
            taken
        })
    };
    Taken(ALLOCATOR.0.each_ref().map(take))
}

impl Drop for Taken {
    fn drop(&mut self) {
        ALLOCATOR.0.iter().zip(self.0).filter(|(_, taken)| *taken).for_each(|(heap, _)| heap.give_back());
    }
}

/// Where the heaps have their memory from.
struct Pages;

// SAFETY: memory that is given out was mapped for that or lies in the reserve, and is given out once.
unsafe impl dlmalloc::Allocator for Pages {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        /// Memory that the heap must not give back or join with other memory.
        const EXTERN: u32 = 1;
        let reserved = |until| RESERVE.cut(size, until).map(|base| (base, size, EXTERN));
        let mapped = || map_huge(size).or_else(|| map(size).map(|base| (base, size, 0)));
        // The last of the reserve is for when the process has as many mappings as it may have.
        let found = reserved(RESERVE_SIZE - RESERVE_FOR_NEED).or_else(mapped);
        found.or_else(|| reserved(RESERVE_SIZE)).unwrap_or((null_mut(), 0, 0))
    }

    fn remap(&self, _: *mut u8, _: usize, _: usize, _: bool) -> *mut u8 {
        null_mut()
    }

    fn free_part(&self, base: *mut u8, old: usize, new: usize) -> bool {
        // SAFETY: the heap does not use this part of a mapping of its own.
        unsafe { unmap(base.wrapping_add(new), old - new) }
    }

    fn free(&self, base: *mut u8, size: usize) -> bool {
        // SAFETY: the heap does not use this mapping of its own any more.
        unsafe { unmap(base, size) }
    }

    fn can_release_part(&self, _: u32) -> bool {
        true
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        PAGE
    }
}

fn map(len: usize) -> Option<*mut u8> {
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    unsafe { rustix::mm::mmap_anonymous(null_mut(), len, prot, flags) }.ok().map(<*mut _>::cast)
}

/// Memory of `size` bytes or more, in whole huge pages.
fn map_huge(size: usize) -> Option<(*mut u8, usize, u32)> {
    let len = size.checked_next_multiple_of(HUGE)?;
    let room = map(len.checked_add(HUGE)?)?;
    let before = room.align_offset(HUGE);
    let base = room.wrapping_add(before);
    // SAFETY: parts of what was mapped a moment ago, which nobody uses; the advice changes no contents.
    unsafe {
        if before > 0 {
            unmap(room, before);
        }
        unmap(base.wrapping_add(len), HUGE - before);
        let _ = rustix::mm::madvise(base.cast(), len, Advice::LinuxHugepage);
    }
    Some((base, len, 0))
}

/// # Safety
/// `[base, base + len)` was mapped with [`map`], and nobody uses it any more.
unsafe fn unmap(base: *mut u8, len: usize) -> bool {
    // SAFETY: of the caller.
    unsafe { rustix::mm::munmap(base.cast(), len) }.is_ok()
}

/// Memory that is part of this library's image: it is there before anything ran, takes no mapping and nothing until it is
/// used, and no claim of a client's about its RAM makes gmem move it (`gmem_host::maps`).
#[repr(C, align(4096))]
struct Reserve {
    bytes: UnsafeCell<[u8; RESERVE_SIZE]>,
    used: AtomicUsize,
}

const RESERVE_SIZE: usize = 4 << 20;
const RESERVE_FOR_NEED: usize = 1 << 20;

static RESERVE: Reserve = Reserve::new();

// SAFETY: every byte is given out once, after which it is whoever's it was given to.
unsafe impl Sync for Reserve {}

impl Reserve {
    const fn new() -> Self {
        Self { bytes: UnsafeCell::new([0; RESERVE_SIZE]), used: AtomicUsize::new(0) }
    }

    /// The next `size` bytes, unless they end after `until`.
    fn cut(&self, size: usize, until: usize) -> Option<*mut u8> {
        let next = |used: usize| used.checked_add(size).filter(|end| *end <= until);
        let start = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok()?;
        Some(self.bytes.get().cast::<u8>().wrapping_add(start))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::hash_map::RandomState;
    use std::hash::BuildHasher;
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::*;

    /// A block with contents that say whose they are.
    struct Block {
        address: usize,
        layout: Layout,
        mark: u8,
    }

    impl Block {
        fn new(heaps: &Heaps, layout: Layout, mark: u8, zeroed: bool) -> Self {
            // SAFETY: the size is not 0.
            let address = unsafe { if zeroed { heaps.alloc_zeroed(layout) } else { heaps.alloc(layout) } };
            assert!(!address.is_null() && address.addr() % layout.align() == 0, "{layout:?} at {address:?}");
            let block = Self { address: address.expose_provenance(), layout, mark };
            assert!(!zeroed || block.bytes().iter().all(|byte| *byte == 0), "{layout:?} was not zeroed");
            block.bytes().fill(mark);
            block
        }

        #[expect(clippy::mut_from_ref, reason = "one thread has the block")]
        fn bytes(&self) -> &mut [u8] {
            // SAFETY: the allocator gave this many bytes to this test alone.
            unsafe {
                core::slice::from_raw_parts_mut(ptr::with_exposed_provenance_mut(self.address), self.layout.size())
            }
        }

        fn check(&self) {
            assert!(self.bytes().iter().all(|byte| *byte == self.mark), "{:?} was overwritten", self.layout);
        }

        fn resize(&mut self, heaps: &Heaps, size: usize) {
            self.check();
            let kept = self.layout.size().min(size);
            let old = ptr::with_exposed_provenance_mut(self.address);
            // SAFETY: a block of this allocator's with this layout, and a size that is not 0.
            let new = unsafe { heaps.realloc(old, self.layout, size) };
            assert!(!new.is_null() && new.addr() % self.layout.align() == 0);
            self.address = new.expose_provenance();
            self.layout = Layout::from_size_align(size, self.layout.align()).unwrap();
            assert!(self.bytes()[..kept].iter().all(|byte| *byte == self.mark), "{:?} lost its bytes", self.layout);
            self.bytes().fill(self.mark);
        }

        fn free(self, heaps: &Heaps) {
            self.check();
            // SAFETY: a block of this allocator's with this layout.
            unsafe { heaps.dealloc(ptr::with_exposed_provenance_mut(self.address), self.layout) };
        }
    }

    fn random(seed: &mut u64) -> usize {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        usize::try_from(*seed >> 33).unwrap()
    }

    /// Mostly small, sometimes large, rarely a mapping of its own.
    fn size(seed: &mut u64) -> usize {
        let bits = match random(seed) % 100 {
            0 => 21,
            1..10 => 16,
            _ => 9,
        };
        1 + random(seed) % (1 << bits)
    }

    #[test]
    fn blocks_of_many_threads_keep_their_bytes_wherever_they_are_freed() {
        const THREADS: usize = 8;
        let heaps = &ALLOCATOR;
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..THREADS).map(|_| mpsc::channel::<Block>()).unzip();
        let start = RandomState::new().hash_one(0) | 1;
        println!("seed {start}");
        std::thread::scope(|scope| {
            for (thread, received) in receivers.into_iter().enumerate() {
                let senders = senders.clone();
                scope.spawn(move || {
                    let mut seed = start.wrapping_mul(2 * thread as u64 + 1);
                    let mut own: Vec<Block> = Vec::new();
                    for step in 0..4000usize {
                        match random(&mut seed) % 8 {
                            0..4 => {
                                let align = 1 << (random(&mut seed) % 14);
                                let layout = Layout::from_size_align(size(&mut seed), align).unwrap();
                                own.push(Block::new(
                                    heaps,
                                    layout,
                                    u8::try_from((step + thread) % 251).unwrap(),
                                    step % 3 == 0,
                                ));
                            }
                            4 if !own.is_empty() => {
                                let index = random(&mut seed) % own.len();
                                own[index].resize(heaps, size(&mut seed));
                            }
                            5 if !own.is_empty() => {
                                let block = own.swap_remove(random(&mut seed) % own.len());
                                let _ = senders[random(&mut seed) % THREADS].send(block);
                            }
                            6 if !own.is_empty() => own.swap_remove(random(&mut seed) % own.len()).free(heaps),
                            _ => received.try_iter().for_each(|block| block.free(heaps)),
                        }
                    }
                    drop(senders);
                    own.into_iter().chain(received.try_iter()).for_each(|block| block.free(heaps));
                });
            }
            drop(senders);
        });
    }

    #[test]
    fn a_taken_heap_is_done_without_and_gets_its_blocks_later() {
        static HEAPS: Heaps = Heaps([const { Heap::new() }; super::HEAPS]);
        let layout = Layout::from_size_align(100, 8).unwrap();
        let heap_of = |block: &Block| {
            // SAFETY: the header of a block that is in use.
            unsafe { (*header_of(ptr::with_exposed_provenance_mut(block.address))).heap_or_next.addr() }
        };
        let blocks = [1, 2].map(|mark| Block::new(&HEAPS, layout, mark, false));
        assert_eq!(blocks.each_ref().map(heap_of), [0, 0]);
        let addresses = blocks.each_ref().map(|block| block.address);
        assert!(HEAPS.0[0].take());
        let mut other = Block::new(&HEAPS, layout, 3, true);
        assert_eq!(heap_of(&other), 1);
        // As a signal handler would free them that interrupted the owner of the heap.
        blocks.into_iter().for_each(|block| block.free(&HEAPS));
        HEAPS.0[1..].iter().for_each(|heap| assert!(heap.take()));
        let begin = Instant::now();
        other.resize(&HEAPS, 200);
        assert_eq!(heap_of(&other), MAPPED);
        assert!(begin.elapsed() < Duration::from_secs(5));
        HEAPS.0.iter().for_each(Heap::give_back);
        let again = [1, 2].map(|mark| Block::new(&HEAPS, layout, mark, false));
        assert!(again.iter().all(|block| addresses.contains(&block.address)), "freed blocks are used again");
        assert!(HEAPS.0.iter().all(|heap| heap.take()));
    }

    #[test]
    fn a_signal_handler_may_allocate_wherever_it_comes() {
        static HEAPS: Heaps = Heaps([const { Heap::new() }; super::HEAPS]);
        static HANDLED: AtomicUsize = AtomicUsize::new(0);
        /// More than there are heaps; the stack has to hold them.
        const DEEPEST: usize = 8;
        const LAYOUT: Layout = Layout::new::<[u64; 20]>();
        extern "C" fn handle(_: std::ffi::c_int) {
            // SAFETY: the size is not 0.
            let blocks = [(); 3].map(|()| unsafe { HEAPS.alloc(LAYOUT) });
            for block in blocks.into_iter().filter(|block| !block.is_null()) {
                // SAFETY: a block of this layout.
                unsafe {
                    block.write_bytes(9, LAYOUT.size());
                    HEAPS.dealloc(block, LAYOUT);
                }
            }
            HANDLED.fetch_add(1, Ordering::Relaxed);
        }
        let done = AtomicBool::new(false);
        // SAFETY: the handler uses heaps that are made for it, and this thread waits for the other one.
        unsafe {
            let mut action: libc::sigaction = core::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            // A handler may be interrupted by the next one.
            action.sa_flags = libc::SA_NODEFER;
            // One that is queued: each that is sent is handled, sooner or later.
            let signal = libc::SIGRTMIN();
            assert_eq!(libc::sigaction(signal, &raw const action, null_mut()), 0);
            let this = libc::pthread_self();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut sent = 0;
                    while !done.load(Ordering::Relaxed) {
                        if sent - HANDLED.load(Ordering::Relaxed) < DEEPEST && libc::pthread_kill(this, signal) == 0 {
                            sent += 1;
                        }
                        std::thread::yield_now();
                    }
                });
                let begin = Instant::now();
                let mut seed = 1;
                while begin.elapsed() < Duration::from_secs(1) {
                    let layouts = [(); 50].map(|()| Layout::from_size_align(size(&mut seed), 16).unwrap());
                    let mut blocks = layouts.map(|layout| Block::new(&HEAPS, layout, 5, false));
                    blocks.iter_mut().step_by(3).for_each(|block| block.resize(&HEAPS, size(&mut seed)));
                    blocks.into_iter().for_each(|block| block.free(&HEAPS));
                }
                done.store(true, Ordering::Relaxed);
            });
        }
        assert!(HANDLED.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn a_part_of_the_reserve_is_for_need_and_nothing_is_given_twice() {
        static RESERVE: Reserve = Reserve::new();
        let usual = RESERVE_SIZE - RESERVE_FOR_NEED;
        let first: Vec<_> = std::iter::from_fn(|| RESERVE.cut(STEP, usual)).collect();
        let rest: Vec<_> = std::iter::from_fn(|| RESERVE.cut(STEP, RESERVE_SIZE)).collect();
        assert_eq!((first.len(), rest.len()), (usual / STEP, RESERVE_FOR_NEED / STEP));
        let all: Vec<usize> = first.iter().chain(&rest).map(|base| base.addr()).collect();
        assert!(all.windows(2).all(|pair| pair[1] - pair[0] == STEP));
        assert!(RESERVE.cut(usize::MAX, RESERVE_SIZE).is_none());
    }

    #[test]
    fn beyond_the_reserve_a_heap_grows_by_huge_pages() {
        for size in [1, STEP, HUGE, HUGE + 1] {
            let (base, len, _) = map_huge(size).unwrap();
            assert_eq!((base.addr() % HUGE, len), (0, size.next_multiple_of(HUGE)));
            let has_huge_pages = std::fs::exists("/sys/kernel/mm/transparent_hugepage").unwrap();
            assert_eq!(gmem_host::maps::VmFlags::at(base.addr()).unwrap().has("hg"), has_huge_pages);
            // SAFETY: what was mapped a moment ago.
            unsafe {
                base.write_bytes(7, len);
                assert!(unmap(base, len));
            }
        }
        assert!(map_huge(usize::MAX).is_none() && map_huge(usize::MAX - HUGE).is_none());
    }

    #[test]
    fn every_alignment_is_kept() {
        for align in (0..26).map(|bits| 1 << bits) {
            for size in [1, 16, 4095, 4096, 1 << 20] {
                let layout = Layout::from_size_align(size, align).unwrap();
                let mut block = Block::new(&ALLOCATOR, layout, 7, true);
                block.resize(&ALLOCATOR, size + 5000);
                block.resize(&ALLOCATOR, 1);
                block.free(&ALLOCATOR);
            }
        }
        // What cannot be had is null and not an error of another kind.
        let huge = Layout::from_size_align(isize::MAX as usize - 4096, 4096).unwrap();
        // SAFETY: the size is not 0.
        assert!(unsafe { ALLOCATOR.alloc(huge) }.is_null());
    }
}
