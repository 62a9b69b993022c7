//! Cost of EL2's ownership calls.

use criterion::{Criterion, criterion_group, criterion_main};
use gmem_core::addr::{Gfn, Level, Pfn, PfnRange};
use gmem_core::vendor::pkvm::{El2, VmHandle};
use std::hint::black_box;

const VM: VmHandle = VmHandle(1);

/// A guest that owns 256 pages and borrows a 2 MiB block.
fn el2() -> El2 {
    let mut el2 = El2::new(PfnRange::with_len(Pfn(0), 1 << 30).unwrap());
    el2.create_vm(VM);
    for page in 0..256 {
        el2.host_donate_guest(Pfn(1000 + page), Gfn(page), VM).unwrap();
    }
    el2.host_share_guest(Pfn(4096), Gfn(4096), Level::Page2M, VM).unwrap();
    el2
}

fn calls(c: &mut Criterion) {
    let mut el2 = el2();
    c.bench_function("pkvm/donate_guest+reclaim", |b| {
        b.iter(|| {
            el2.host_donate_guest(black_box(Pfn(9000)), black_box(Gfn(9000)), VM).unwrap();
            el2.host_reclaim_page_guest(black_box(Gfn(9000)), VM)
        });
    });
    c.bench_function("pkvm/guest_share+unshare", |b| {
        b.iter(|| {
            el2.guest_share_host(VM, black_box(Gfn(128))).unwrap();
            el2.guest_unshare_host(VM, black_box(Gfn(128)))
        });
    });
    c.bench_function("pkvm/share_hyp+unshare_hyp", |b| {
        b.iter(|| {
            el2.host_share_hyp(black_box(Pfn(77))).unwrap();
            el2.host_unshare_hyp(black_box(Pfn(77)))
        });
    });
    c.bench_function("pkvm/donate_hyp 1 GiB and back", |b| {
        let range = PfnRange::with_len(Pfn(1 << 20), 1 << 18).unwrap();
        b.iter(|| {
            el2.host_donate_hyp(black_box(range)).unwrap();
            el2.hyp_donate_host(black_box(range))
        });
    });
}

criterion_group!(benches, calls);
criterion_main!(benches);
