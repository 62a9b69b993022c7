//! What the subsystem's main operations cost.
#![allow(missing_docs, reason = "criterion's macros")]

use criterion::{Criterion, criterion_group, criterion_main};
use gmem_core::Vm;
use gmem_core::addr::{Gfn, GfnRange, PAGE_SIZE, PageRange};
use gmem_core::arch::Arch;
use gmem_core::file::FileFlags;
use gmem_core::ops::{self, Access, Claim, FileClaim, Origin, SetAttributes, SetRegion};
use gmem_core::slot::SlotFlags;
use gmem_core::vendor::Side;
use gmem_core::vm::Rules;
use std::{hint::black_box, time::Duration};

const TIB: u64 = 1 << 28;
const GIB: u64 = 1 << 18;

fn vm() -> Vm {
    Vm::new(Arch::SwProtected, Rules::default())
}

fn frames(start: u64, count: u64) -> GfnRange {
    PageRange::with_len(Gfn(start), count).expect("a range")
}

fn set(vm: &mut Vm, range: GfnRange, side: Side) {
    ops::run(&mut SetAttributes::new(range, side), vm, |_, _, action| {
        black_box(action);
    });
}

/// A VM whose first `count` frames are bound to a file, in slots of 1 TiB.
fn bound(count: u64) -> Vm {
    let mut vm = vm();
    let file = vm.create_file(count * PAGE_SIZE, 0, FileFlags::empty()).expect("valid");
    let claim = Claim {
        slot: 0,
        flags: SlotFlags::GUEST_MEMFD.bits(),
        guest_phys_addr: 0,
        memory_size: count * PAGE_SIZE,
        userspace_addr: 0,
        file: FileClaim::File(file),
        guest_memfd_offset: 0,
    };
    ops::run(&mut SetRegion::new(claim), &mut vm, |_, _, _| {}).expect("valid");
    vm
}

/// One page in each 2 MiB is shared.
fn fragment(vm: &mut Vm, count: u64) {
    set(vm, frames(0, count), Side::Private);
    for block in 0..count / 512 {
        set(vm, frames(block * 512 + block % 512, 1), Side::Shared);
    }
}

fn random(state: &mut u64, limit: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 32) % limit
}

fn attributes(c: &mut Criterion) {
    let mut group = c.benchmark_group("attributes");
    for (name, count) in [("16 GiB", 16 * GIB), ("1 TiB", TIB), ("1 TiB but for the edges", TIB - 2)] {
        group.bench_function(format!("{name} private, no slot, new VM"), |b| {
            b.iter_batched_ref(
                vm,
                |vm| set(vm, frames(TIB - count, count), Side::Private),
                criterion::BatchSize::SmallInput,
            );
        });
        let mut vm = vm();
        set(&mut vm, frames(TIB - count, count), Side::Private);
        println!("{name} private: {} bytes of heap", vm.attribute_heap_bytes());
    }
    let mut converted = bound(TIB);
    let (mut seed, mut side) = (1, Side::Private);
    group.bench_function("4 KiB converted, bound slot of 1 TiB", |b| {
        b.iter(|| {
            side = side.other();
            set(&mut converted, frames(random(&mut seed, TIB), 1), side);
        });
    });
    println!("after random conversions: {} bytes of heap", converted.attribute_heap_bytes());
}

fn lookups(c: &mut Criterion) {
    let mut group = c.benchmark_group("lookups");
    for fragmented in [false, true] {
        let mut vm = bound(TIB);
        if fragmented {
            fragment(&mut vm, TIB);
        } else {
            set(&mut vm, frames(0, TIB), Side::Private);
        }
        let state = if fragmented { "fragmented" } else { "uniform" };
        println!("1 TiB {state}: {} bytes of heap", vm.attribute_heap_bytes());
        let mut seed = 1;
        group.bench_function(format!("attribute, 1 TiB {state}"), |b| {
            b.iter(|| vm.attribute(Gfn(random(&mut seed, TIB))));
        });
        group.bench_function(format!("view, 1 TiB {state}"), |b| b.iter(|| vm.view(Gfn(random(&mut seed, TIB)))));
    }
}

fn faults(c: &mut Criterion) {
    let mut group = c.benchmark_group("faults");
    let mut vm = bound(16 * GIB);
    set(&mut vm, frames(0, 16 * GIB), Side::Private);
    let mut seed = 1;
    group.bench_function("private fault, 16 GiB, random pages", |b| {
        b.iter(|| {
            let access = Access { gfn: Gfn(random(&mut seed, 16 * GIB)), claimed: Side::Private };
            ops::run(&mut ops::Fault::new(access, Origin::Guest), &mut vm, |_, _, action| {
                black_box(action);
            })
        });
    });
}

fn files(c: &mut Criterion) {
    c.bench_function("create a file of 64 TiB", |b| {
        b.iter_batched_ref(
            vm,
            |vm| vm.create_file(black_box(64 << 40), 0, FileFlags::empty()),
            criterion::BatchSize::SmallInput,
        );
    });
}

fn config() -> Criterion {
    let short = Duration::from_millis(300);
    Criterion::default().warm_up_time(short).measurement_time(2 * short).sample_size(30)
}

criterion_group! { name = benches; config = config(); targets = attributes, lookups, faults, files }
criterion_main!(benches);
