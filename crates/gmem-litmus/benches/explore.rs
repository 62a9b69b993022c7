//! How many transitions a second, on programs of several sizes.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gmem_litmus::{Options, Reduction, parse, run};

const PROGRAMS: &[(&str, &str)] = &[
    ("two threads", include_str!("../../../litmus/punch-of-page-in-use.litmus")),
    ("four threads", include_str!("../../../litmus/freed-memory-is-foreign.litmus")),
    ("five threads", include_str!("large.litmus")),
];

fn explore(c: &mut Criterion) {
    let mut group = c.benchmark_group("explore");
    group.sample_size(10);
    for (name, text) in PROGRAMS {
        let Ok(program) = parse(text) else { continue };
        for (mode, reduction) in [("reduced", Reduction::On), ("all", Reduction::Off)] {
            let options = Options { reduction, ..Options::default() };
            let Ok(report) = run(&program, program.types[0], &options) else { continue };
            group.throughput(Throughput::Elements(report.transitions));
            group.bench_with_input(BenchmarkId::new(*name, mode), &options, |b, options| {
                b.iter(|| run(&program, program.types[0], options));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, explore);
criterion_main!(benches);
