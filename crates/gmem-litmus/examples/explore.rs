//! Explores files and prints what was found; the command line in small.
fn main() {
    let mutate = std::env::var("MUTANT").ok().and_then(|name| gmem_litmus::Mutant::of_name(&name));
    let reduction =
        if std::env::var("NORED").is_ok() { gmem_litmus::Reduction::Off } else { gmem_litmus::Reduction::On };
    for path in std::env::args().skip(1) {
        let text = std::fs::read_to_string(&path).unwrap();
        let program = match gmem_litmus::parse(&text) {
            Ok(program) => program,
            Err(error) => {
                println!("{path}:{error}");
                continue;
            }
        };
        for &vm_type in &program.types {
            let options = gmem_litmus::Options { mutant: mutate, reduction, ..Default::default() };
            let start = std::time::Instant::now();
            match gmem_litmus::run(&program, vm_type, &options) {
                Err(error) => println!("{path} {}: {error}", vm_type.name()),
                Ok(report) => {
                    let rate = report.transitions as f64 / start.elapsed().as_secs_f64() / 1e6;
                    println!(
                        "{path} {}: {} states, {} transitions, {} interleavings, {} KiB, {rate:.2} M/s{}",
                        vm_type.name(),
                        report.states,
                        report.transitions,
                        report.interleavings,
                        report.memory / 1024,
                        if report.holds() { "" } else { " FAILS" }
                    );
                    for ended in &report.outcomes {
                        println!("   {:>12} {}", ended.count, ended.words);
                    }
                    for violation in &report.violations {
                        println!("   ! {violation:?}");
                    }
                    for event in &report.trace {
                        println!("      [{}] {}", event.thread, event.what);
                    }
                }
            }
        }
    }
}
