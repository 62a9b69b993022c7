//! Replays recorded runs of TF-RMM.
//!
//! A transcript's commands name granules by number and address spaces by byte. The recording host had its granules at an
//! address of its own and printed a granule as `0xb0000000` plus its number; the model has them at that address and prints
//! the same.

use super::{Case, Transcript};
use crate::measure::cca::{apply, parse_number, realm_params};
use crate::measure::report::hex;
use gmem_core::addr::{Pfn, PfnRange};
use gmem_core::measure::cca::{RecParams as BootState, Rim};
use gmem_core::vendor::cca::{
    Platform, RealmOutcome, RealmParams, RealmStep, RecEntry, RecExit, RecParams, Reply, Rmm, RmmVersion, Source,
};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Address as which granule 0 is printed; a multiple of 2 MiB.
const BASE: u64 = 0xb000_0000;
/// Granules of a 2 MiB block.
const BLOCK: u64 = 512;
/// Granules of the recording host, 1 GiB.
const GRANULES: u64 = 0x4_0000;

/// Replays a JSON file, if it is one of the CCA shapes.
pub(crate) fn replay(file: &Value) -> Option<Vec<Case>> {
    if let Some(vectors) = file.get("vectors").and_then(Value::as_array) {
        let is_rim = vectors.iter().any(|vector| vector["ops"][0]["op"] == "realm_create");
        return is_rim.then(|| vectors.iter().flat_map(rim_cases).collect());
    }
    let rows = file.get("rows").and_then(Value::as_array)?;
    let is_matrix = rows.iter().any(|row| row.get("realm_state").is_some());
    is_matrix.then(|| rows.iter().enumerate().map(|(number, row)| matrix_case(number, row)).collect())
}

/// One fact per step, and the final value.
fn rim_cases(vector: &Value) -> Vec<Case> {
    let name = vector["name"].as_str().unwrap_or("unnamed");
    let ops = vector["ops"].as_array().map_or(&[][..], Vec::as_slice);
    let mut rim: Option<Rim> = None;
    let mut cases = Vec::new();
    for (number, op) in ops.iter().enumerate() {
        let expected = vector["rim_after_each_op"][number].as_str().unwrap_or("nothing recorded");
        let got = extend(&mut rim, op).unwrap_or_else(|error| error.to_string());
        cases.push(Case::compare(format!("{name} step {number} {}", op["op"]), expected, got));
    }
    let end = rim.map_or_else(|| "no realm".into(), |rim| hex(rim.value()));
    cases.push(Case::compare(name, vector["rim"].as_str().unwrap_or("nothing recorded"), end));
    cases
}

fn extend(rim: &mut Option<Rim>, op: &Value) -> anyhow::Result<String> {
    match rim {
        None => *rim = Some(Rim::new(&realm_params(op)?)),
        Some(rim) => apply(rim, op, Path::new("."), &mut |_, _| ())?,
    }
    Ok(rim.map_or_else(String::new, |rim| hex(rim.value())))
}

/// One row: a state is built, the recorded commands are run again, and answers and the state afterwards are compared.
fn matrix_case(number: usize, row: &Value) -> Case {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let (state, hipas, ripas) = (text(&row["realm_state"]), text(&row["pre"]["hipas"]), text(&row["pre"]["ripas"]));
    let name = format!("row {number}: {state} {hipas}/{ripas} {}", text(&row["command"]));
    let output: Vec<String> = row["output"].as_array().into_iter().flatten().map(&text).collect();
    let post = &row["post"];
    let after = format!("level {} {}/{}", post["walk_level"], text(&post["hipas"]), text(&post["ripas"]));
    let granules = [text(&row["data_granule_21"]), text(&row["data_granule_22"])];
    let expected = [output.as_slice(), &[after], &granules].concat().join("\n");
    let got = matrix_row(&state, &hipas, &ripas, &output).unwrap_or_else(|problem| problem);
    Case::compare(name, expected, got)
}

fn matrix_row(state: &str, hipas: &str, ripas: &str, output: &[String]) -> Result<String, String> {
    let mut host = Host::new(0);
    for command in setup(state, hipas, ripas)? {
        let lines = host.run(command)?;
        if lines.iter().any(|line| line.contains("ERROR")) {
            return Err(format!("cannot build the state: {}", lines.join("; ")));
        }
    }
    let mut lines = Vec::new();
    for recorded in output.iter().filter(|line| !line.starts_with(' ')) {
        lines.extend(host.run(recorded.split(" -> ").next().unwrap_or_default())?);
    }
    lines.push(host.entry_state()?);
    lines.extend([host.granule_state(21), host.granule_state(22)]);
    Ok(lines.join("\n"))
}

/// Commands that bring the level 3 entry of IPA 0 into a state.
fn setup(state: &str, hipas: &str, ripas: &str) -> Result<Vec<&'static str>, String> {
    let realm = ["delegate 1", "delegate 2", "realm_create 1 10 2 1 0 48 0 0 0 1 1 0 1"];
    let tables = ["delegate 3", "delegate 4", "delegate 5", "rtt_create 1 3 0 1", "rtt_create 1 4 0 2"];
    let rest = ["rtt_create 1 5 0 3", "delegate 21", "delegate 22", "delegate 30", "delegate_range 40 16"];
    let (create, destroy, unknown) =
        ("data_create 1 21 0x0 20 1", "data_destroy 1 0x0", "data_create_unknown 1 21 0x0");
    let entry: &[&str] = match (hipas, ripas) {
        ("UNASSIGNED", "EMPTY") => &[],
        ("UNASSIGNED", "RAM") => &["rtt_init_ripas 1 0x0 0x1000"],
        ("UNASSIGNED", "DESTROYED") => &[create, destroy],
        ("ASSIGNED", "EMPTY") => &[unknown],
        ("ASSIGNED", "RAM") => &[create],
        ("ASSIGNED", "DESTROYED") => &[create, destroy, unknown],
        _ => return Err(format!("unknown state {hipas}/{ripas}")),
    };
    let activate: &[&str] = match state {
        "NEW" => &[],
        "ACTIVE" => &["realm_activate 1"],
        _ => return Err(format!("unknown realm state {state}")),
    };
    let rec: &[&str] = &["rec_create 1 30 31 40 1 0"];
    Ok([&realm[..], &tables, &rest, entry, rec, activate].concat())
}

/// Replays a recorded run, if it is one of an RMM.
///
/// One thing about the recording host is not recorded: where within 2 MiB its granule 0 was, on which it depends whether
/// granules fold into a block. It is taken to have been aligned. If not all lines come out then, the places are tried at
/// which a block that the commands map would be aligned; one at which every line comes out is taken, and named.
pub(crate) fn replay_transcript(input: &str, recorded: &str) -> Option<Transcript> {
    if !recorded.lines().any(|line| line.contains(" -> RMI_")) {
        return None;
    }
    let commands: Vec<&str> = input.lines().map(str::trim_end).filter(|line| is_content(line)).collect();
    let first = *commands.first()?;
    // What the monitor prints while it boots comes before the first echoed line.
    let is_banner = |line: &&str| !line.starts_with('#') && !line.starts_with(first);
    let body = recorded.lines().enumerate().skip_while(|(_, line)| is_banner(line));
    let expected = body.map(|(number, line)| (number + 1, line.trim_end())).filter(|(_, line)| is_content(line));
    let run = |skew| transcript_cases(&commands, expected.clone(), Host::new(skew));
    let passes = |cases: &[Case]| cases.iter().all(|case| case.outcome.is_ok());
    let aligned = run(0);
    if !passes(&aligned) {
        let mut skewed = skews(&commands).into_iter().map(|skew| (skew, run(skew)));
        if let Some((skew, cases)) = skewed.find(|(_, cases)| passes(cases)) {
            let reading =
                Some(format!("granule 0 of the recording host was {skew} granules above a multiple of 2 MiB"));
            return Some(Transcript { cases, reading });
        }
    }
    Some(Transcript { cases: aligned, reading: None })
}

/// Offsets of granule 0 at which a granule that the commands map where a block begins would begin a block too.
///
/// Only folding and mapping of blocks look at that; without them there is nothing to try.
fn skews(commands: &[&str]) -> BTreeSet<u64> {
    let words: Vec<Vec<&str>> = commands.iter().map(|command| command.split_whitespace().collect()).collect();
    let looks_at_alignment = |words: &Vec<&str>| match words.as_slice() {
        ["rtt_fold", ..] => true,
        [command, _, _, level, ..] => command.starts_with("rtt_map_unprotected") && *level != "3",
        _ => false,
    };
    if !words.iter().any(looks_at_alignment) {
        return BTreeSet::new();
    }
    let first_of_block = |words: &Vec<&str>| {
        let (ipa, granule) = match words.as_slice() {
            [command, _, granule, ipa, ..] if command.starts_with("data_create") => (ipa, granule),
            [command, _, ipa, _, granule, ..] if command.starts_with("rtt_map_unprotected") => (ipa, granule),
            _ => return None,
        };
        let granule = argument(granule)?;
        argument(ipa)?.is_multiple_of(BLOCK * 4096).then_some((BLOCK - granule % BLOCK) % BLOCK)
    };
    words.iter().filter_map(first_of_block).filter(|skew| *skew != 0).collect()
}

fn transcript_cases<'a>(
    commands: &[&str],
    expected: impl Iterator<Item = (usize, &'a str)>,
    mut host: Host,
) -> Vec<Case> {
    let mut got = commands.iter().flat_map(|command| host.run(command).unwrap_or_else(|problem| vec![problem]));
    let mut cases: Vec<Case> = expected
        .map(|(number, line)| {
            let got = got.next().unwrap_or_else(|| "no more output".into());
            Case::compare(format!("line {number}: {}", line.trim_start()), line, got)
        })
        .collect();
    cases.extend(got.map(|line| Case::compare("after the last line", "no more output", line)));
    cases
}

fn is_content(line: &str) -> bool {
    !line.trim().is_empty() && !line.starts_with('#')
}

/// Where the recording host has its granules.
#[derive(Clone, Copy)]
struct Memory {
    /// Address of granule 0.
    base: u64,
}

impl Memory {
    fn address(self, granule: u64) -> u64 {
        granule.saturating_mul(4096).saturating_add(self.base)
    }

    /// Puts output `index`, a physical address, into the form in which the recording host prints it.
    fn print(self, mut reply: Reply, index: usize) -> Reply {
        let offset = reply.x[index].wrapping_sub(self.base);
        if offset < GRANULES * 4096 {
            reply.x[index] = BASE + offset / 4096;
        }
        reply
    }
}

/// The recording host: a monitor, memory, and a realm that does what `prog` told it.
struct Host {
    rmm: Rmm,
    memory: Memory,
    fills: BTreeMap<u64, u8>,
    program: Option<RealmStep>,
    /// X0 to X2 when the realm last ran on after its step.
    seen: [u64; 3],
}

impl Host {
    /// A host whose granule 0 lies `skew` granules after a multiple of 2 MiB.
    fn new(skew: u64) -> Self {
        let granule = BASE / 4096 + skew;
        let memory = PfnRange::new(Pfn(granule), Pfn(granule + GRANULES)).expect("a constant range");
        let rmm = Rmm::new(RmmVersion::V1_0, Platform::fake_host(memory)).expect("version 1.0 is modelled");
        Self { rmm, memory: Memory { base: granule * 4096 }, fills: BTreeMap::new(), program: None, seen: [0; 3] }
    }

    /// Runs one command and prints what the recording host prints.
    fn run(&mut self, line: &str) -> Result<Vec<String>, String> {
        let unknown = || format!("{line}: the model has no such command");
        let mut words = line.split_whitespace();
        let command = words.next().ok_or_else(unknown)?;
        let words: Vec<&str> = words.collect();
        if command == "prog" {
            self.program = Some(program(&words).ok_or_else(unknown)?);
            return Ok(vec![line.into()]);
        }
        let args: Option<Vec<u64>> = words.iter().map(|word| argument(word)).collect();
        let args = args.ok_or_else(unknown)?;
        if let Some(single) = command.strip_suffix("_range") {
            let done = self.range(single, &args).ok_or_else(unknown)?;
            return Ok(vec![format!("{line} -> {done} ok")]);
        }
        match (command, args.as_slice()) {
            ("fill", [granule, byte]) => {
                self.fills.insert(*granule, u8::try_from(*byte).map_err(|_| unknown())?);
                Ok(vec![line.into()])
            }
            ("gstate", [granule]) => Ok(vec![format!("{line} -> {}", self.granule_state(*granule))]),
            ("rec_enter", [rec, run, rest @ ..]) => {
                let entry = RecEntry { flags: rest.first().copied().unwrap_or(0), gpr0: 0 };
                self.rec_enter(line, *rec, *run, entry)
            }
            (command, args) => {
                let (reply, outputs) = self.command(command, args).ok_or_else(unknown)?;
                Ok(vec![print_reply(line, &reply, outputs)])
            }
        }
    }

    /// A command repeated over consecutive granules or pages; the last argument is the count. Answers how many succeeded.
    fn range(&mut self, command: &str, args: &[u64]) -> Option<u64> {
        let (&count, first) = args.split_last()?;
        let mut done = 0;
        for step in 0..count.min(GRANULES) {
            let mut args = first.to_vec();
            // The realm and the source stay; a granule advances by one, an address by a page.
            match (command, args.as_mut_slice()) {
                ("delegate" | "undelegate", [granule]) => *granule = granule.wrapping_add(step),
                ("data_create" | "data_create_unknown", [_, granule, ipa, ..]) => {
                    *granule = granule.wrapping_add(step);
                    *ipa = ipa.wrapping_add(step * 4096);
                }
                ("data_destroy", [_, ipa]) => *ipa = ipa.wrapping_add(step * 4096),
                ("rtt_map_unprotected", [_, ipa, level, granule, _]) => {
                    *granule = granule.wrapping_add(step << block_shift(*level));
                    *ipa = ipa.wrapping_add(step << (12 + block_shift(*level)));
                }
                ("rtt_unmap_unprotected", [_, ipa, level]) => {
                    *ipa = ipa.wrapping_add(step << (12 + block_shift(*level)));
                }
                _ => return None,
            }
            let (reply, _) = self.command(command, &args)?;
            done += u64::from(reply.is_success());
        }
        Some(done)
    }

    /// One RMI command, and the number of outputs that are printed with it.
    fn command(&mut self, command: &str, args: &[u64]) -> Option<(Reply, usize)> {
        self.lifecycle_command(command, args)
            .or_else(|| self.data_command(command, args))
            .or_else(|| self.table_command(command, args))
    }

    fn lifecycle_command(&mut self, command: &str, args: &[u64]) -> Option<(Reply, usize)> {
        let (rmm, memory) = (&mut self.rmm, self.memory);
        let at = |granule: &u64| memory.address(*granule);
        let reply = match (command, args) {
            ("version", [version]) => return Some((rmm.version(*version), 2)),
            ("features", [index]) => return Some((rmm.features(*index), 1)),
            ("rec_aux_count", [rd]) => return Some((rmm.rec_aux_count(at(rd)), 1)),
            ("delegate", [granule]) => rmm.granule_delegate(at(granule)),
            ("undelegate", [granule]) => rmm.granule_undelegate(at(granule)),
            ("realm_create", [rd, params, rest @ ..]) => {
                rmm.realm_create(at(rd), at(params), &realm_create_params(memory, rest)?)
            }
            ("realm_activate", [rd]) => rmm.realm_activate(at(rd)),
            ("realm_destroy", [rd]) => rmm.realm_destroy(at(rd)),
            ("rec_create", [rd, rec, params, aux, flags, mpidr]) => {
                let boot = BootState { flags: *flags, ..BootState::default() };
                let aux = (0..16).map(|number| at(&aux.saturating_add(number))).collect();
                rmm.rec_create(at(rd), at(rec), at(params), &RecParams { boot, mpidr: *mpidr, aux })
            }
            ("rec_destroy", [rec]) => rmm.rec_destroy(at(rec)),
            ("psci_complete", [calling, target, status]) => rmm.psci_complete(at(calling), at(target), *status),
            _ => return None,
        };
        Some((reply, 0))
    }

    fn data_command(&mut self, command: &str, args: &[u64]) -> Option<(Reply, usize)> {
        let (rmm, memory) = (&mut self.rmm, self.memory);
        let at = |granule: &u64| memory.address(*granule);
        Some(match (command, args) {
            ("data_create", [rd, data, ipa, source, flags]) => {
                let content = [self.fills.get(source).copied().unwrap_or(0); 4096];
                let source = Source { address: at(source), content: &content, flags: *flags };
                (rmm.data_create(at(rd), at(data), *ipa, source), 0)
            }
            ("data_create_unknown", [rd, data, ipa]) => (rmm.data_create_unknown(at(rd), at(data), *ipa), 0),
            ("data_destroy", [rd, ipa]) => (memory.print(rmm.data_destroy(at(rd), *ipa), 0), 2),
            ("rtt_init_ripas", [rd, base, top]) => (rmm.rtt_init_ripas(at(rd), *base, *top), 1),
            ("rtt_set_ripas", [rd, rec, base, top]) => (rmm.rtt_set_ripas(at(rd), at(rec), *base, *top), 1),
            _ => return None,
        })
    }

    fn table_command(&mut self, command: &str, args: &[u64]) -> Option<(Reply, usize)> {
        let (rmm, memory) = (&mut self.rmm, self.memory);
        let at = |granule: &u64| memory.address(*granule);
        Some(match (command, args) {
            ("rtt_create", [rd, rtt, ipa, level]) => (rmm.rtt_create(at(rd), at(rtt), *ipa, *level), 0),
            ("rtt_destroy", [rd, ipa, level]) => (memory.print(rmm.rtt_destroy(at(rd), *ipa, *level), 0), 2),
            ("rtt_fold", [rd, ipa, level]) => (memory.print(rmm.rtt_fold(at(rd), *ipa, *level), 0), 1),
            ("rtt_read_entry", [rd, ipa, level]) => (memory.print(rmm.rtt_read_entry(at(rd), *ipa, *level), 2), 4),
            ("rtt_map_unprotected", [rd, ipa, level, granule, attributes]) => {
                (rmm.rtt_map_unprotected(at(rd), *ipa, *level, at(granule) | attributes), 0)
            }
            ("rtt_unmap_unprotected", [rd, ipa, level]) => (rmm.rtt_unmap_unprotected(at(rd), *ipa, *level), 1),
            _ => return None,
        })
    }

    fn rec_enter(&mut self, line: &str, rec: u64, run: u64, entry: RecEntry) -> Result<Vec<String>, String> {
        let rec = self.memory.address(rec);
        let reply = self.rmm.rec_enter(rec, self.memory.address(run), entry);
        let mut lines = vec![print_reply(line, &reply, 0)];
        if reply.is_success() {
            let (exit, ran) = self.run_realm(rec).ok_or_else(|| format!("{line}: the realm's step is not modelled"))?;
            lines.push(self.print_exit(&exit, ran));
        }
        Ok(lines)
    }

    /// The realm takes its step and, if it runs on, leaves with a fast interrupt.
    fn run_realm(&mut self, rec: u64) -> Option<(RecExit, &'static str)> {
        let mut ran = "realm_ran";
        if let Some(step) = self.program.take() {
            match self.rmm.realm_step(rec, step).ok()? {
                RealmOutcome::Exit(exit) => return Some((exit, "realm_not_resumed")),
                RealmOutcome::ExternalAbort => ran = "REALM_SAW_SEA",
                RealmOutcome::Resumed | RealmOutcome::Undefined => {}
            }
        }
        let regs = self.rmm.rec(rec)?.regs();
        self.seen = [regs[0], regs[1], regs[2]];
        match self.rmm.realm_step(rec, RealmStep::Fiq).ok()? {
            RealmOutcome::Exit(exit) => Some((exit, ran)),
            _ => None,
        }
    }

    fn print_exit(&self, exit: &RecExit, ran: &str) -> String {
        let [x0, x1, x2] = self.seen;
        format!(
            "   exit_reason={} esr={:#x} hpfar={:#x} far={:#x} ripas_base={:#x} ripas_top={:#x} ripas_value={} {ran} \
             realm_x0..x2={x0:#x},{x1:#x},{x2:#x}",
            exit.kind.raw(),
            exit.esr,
            exit.hpfar,
            exit.far,
            exit.ripas_base,
            exit.ripas_top,
            exit.ripas_value,
        )
    }

    fn granule_state(&self, granule: u64) -> String {
        let address = self.memory.address(granule);
        match (self.rmm.granule(address), self.rmm.refcount(address)) {
            (Some(state), Some(count)) => format!("state={} refcount={count}", state.raw()),
            _ => "no such granule".into(),
        }
    }

    /// The entry of IPA 0 in the words of the matrix.
    fn entry_state(&self) -> Result<String, String> {
        let reply = self.rmm.rtt_read_entry(self.memory.address(1), 0, 3);
        let word = |words: [&'static str; 3], index: u64| {
            usize::try_from(index).ok().and_then(|index| words.get(index).copied()).ok_or("no such state")
        };
        let hipas = word(["UNASSIGNED", "ASSIGNED", "TABLE"], reply.x[1])?;
        let ripas = word(["EMPTY", "RAM", "DESTROYED"], reply.x[3])?;
        Ok(format!("level {} {hipas}/{ripas}", reply.x[0]))
    }
}

/// A number; a negative one is a register in two's complement.
fn argument(word: &str) -> Option<u64> {
    parse_number(word).or_else(|| word.parse().ok().map(i64::cast_unsigned))
}

/// Base-2 logarithm of the granules that an entry of `level` maps.
fn block_shift(level: u64) -> u64 {
    9 * 3u64.saturating_sub(level)
}

fn print_reply(line: &str, reply: &Reply, outputs: usize) -> String {
    let mut text = format!("{line} -> {}", reply.status.name());
    if !reply.is_success() {
        text += &format!(" index={}", reply.status.index());
    }
    for (number, value) in (1..).zip(&reply.x[..outputs]) {
        text += &format!(" x{number}={value:#x}");
    }
    text
}

/// `prog dabt IPA ESR` or `prog rsi FID ARGS...`.
fn program(words: &[&str]) -> Option<RealmStep> {
    let (kind, args) = words.split_first()?;
    let args: Vec<u64> = args.iter().map(|word| argument(word)).collect::<Option<_>>()?;
    match (*kind, args.as_slice()) {
        ("dabt" | "iabt", [ipa, esr]) => Some(RealmStep::Sync { esr: *esr, ipa: *ipa, far: 0 }),
        ("rsi" | "psci" | "smc", args) if args.len() <= 11 => {
            let mut regs = [0; 11];
            regs[..args.len()].copy_from_slice(args);
            Some(RealmStep::Smc(regs))
        }
        _ => None,
    }
}

/// Arguments of `realm_create` after the two addresses.
fn realm_create_params(memory: Memory, args: &[u64]) -> Option<RealmParams> {
    let &[base, num, level, s2sz, hash_algo, flags, sve_vl, num_bps, num_wps, pmu, vmid] = args else { return None };
    let byte = |value| u8::try_from(value).ok();
    Some(RealmParams {
        flags,
        s2sz,
        sve_vl: byte(sve_vl)?,
        num_bps: byte(num_bps)?,
        num_wps: byte(num_wps)?,
        pmu_num_ctrs: byte(pmu)?,
        hash_algo,
        vmid,
        rtt_base: memory.address(base),
        rtt_level_start: level.cast_signed(),
        rtt_num_start: num,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(name: &str) -> String {
        let path = format!("{}/../../vectors/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn assert_all_pass(cases: &[Case], at_least: usize) {
        assert!(cases.len() >= at_least, "only {} cases", cases.len());
        for case in cases {
            if let Err(mismatch) = &case.outcome {
                panic!("{}\n  recorded {:?}\n  modelled {}", case.name, mismatch.expected, mismatch.got);
            }
        }
    }

    #[test]
    fn every_recorded_measurement() {
        let file = serde_json::from_str(&vector("cca_rim_rmm1_0.json")).unwrap();
        assert_all_pass(&replay(&file).unwrap(), 25);
    }

    #[test]
    fn every_row_of_the_state_matrix() {
        let file = serde_json::from_str(&vector("cca_rmm1_0_state_matrix.json")).unwrap();
        assert_all_pass(&replay(&file).unwrap(), 60);
    }

    #[test]
    fn every_line_of_the_transcript() {
        let name = "cca_rmm1_0_transcript_lifecycle";
        let cases = replay_transcript(&vector(&format!("{name}.input.txt")), &vector(&format!("{name}.txt")));
        assert_all_pass(&cases.unwrap().cases, 180);
    }

    #[test]
    fn a_wrong_recording_is_noticed() {
        let cases =
            replay_transcript("delegate 1\ndelegate 1\n", "delegate 1 -> RMI_SUCCESS\ndelegate 1 -> RMI_SUCCESS\n");
        let passed: Vec<bool> = cases.unwrap().cases.iter().map(|case| case.outcome.is_ok()).collect();
        assert_eq!(passed, [true, false]);
        let cases = replay_transcript("delegate 1\nsing\n", "delegate 1 -> RMI_SUCCESS\n").unwrap().cases;
        assert!(cases[1].outcome.is_err());
    }

    #[test]
    fn where_granules_were_is_told_by_what_folds() {
        // Granules from 100 fold only if that one is aligned.
        let realm = setup("NEW", "UNASSIGNED", "EMPTY").unwrap();
        let fold = ["delegate_range 100 512", "data_create_unknown_range 1 100 0x0 512", "rtt_fold 1 0x0 3"];
        let commands: Vec<&str> =
            realm.into_iter().filter(|line| !line.contains("40 16")).take(10).chain(fold).collect();
        let mut host = Host::new(BLOCK - 100);
        let recorded: Vec<String> = commands.iter().flat_map(|command| host.run(command).unwrap()).collect();
        assert!(recorded.last().unwrap().starts_with("rtt_fold 1 0x0 3 -> RMI_SUCCESS"), "{recorded:?}");
        let replayed = replay_transcript(&commands.join("\n"), &recorded.join("\n")).unwrap();
        assert_all_pass(&replayed.cases, commands.len());
        assert!(replayed.reading.unwrap().contains("412 granules"));
    }

    #[test]
    fn folding_a_block_and_unfolding_it_again() {
        let mut host = Host::new(0);
        for command in setup("NEW", "UNASSIGNED", "EMPTY").unwrap() {
            host.run(command).unwrap();
        }
        let mut run = |line: &str| host.run(line).unwrap().pop().unwrap();
        assert_eq!(run("delegate_range 512 512"), "delegate_range 512 512 -> 512 ok");
        assert_eq!(run("data_create_unknown_range 1 512 0x0 512"), "data_create_unknown_range 1 512 0x0 512 -> 512 ok");
        assert_eq!(run("gstate 5"), "gstate 5 -> state=6 refcount=512");
        assert_eq!(run("rtt_fold 1 0x0 3"), "rtt_fold 1 0x0 3 -> RMI_SUCCESS x1=0xb0000005");
        assert_eq!(
            run("rtt_read_entry 1 0x0 3"),
            "rtt_read_entry 1 0x0 3 -> RMI_SUCCESS x1=0x2 x2=0x1 x3=0xb0000200 x4=0x0"
        );
        assert_eq!(run("data_destroy 1 0x0"), "data_destroy 1 0x0 -> RMI_ERROR_RTT index=2 x1=0x0 x2=0x0");
        assert_eq!(run("rtt_create 1 5 0x0 3"), "rtt_create 1 5 0x0 3 -> RMI_SUCCESS");
        assert_eq!(run("data_destroy 1 0x0"), "data_destroy 1 0x0 -> RMI_SUCCESS x1=0xb0000200 x2=0x1000");
        assert_eq!(run("rtt_fold 1 0x0 3"), "rtt_fold 1 0x0 3 -> RMI_ERROR_RTT index=3 x1=0x0");
    }
}
