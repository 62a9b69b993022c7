//! Replays recordings of the Intel TDX module 1.5.05 against the model: the entry-state matrix, MRTD values, the module's
//! tables, and transcripts.
//!
//! The recordings were made by a driver around the module's handlers. What it used and the files do not repeat: one
//! memory range of 1 GiB at 0x4000_0000 with the TD root in its first page, 4 KiB pages `p<n>` from 0x4010_0000, 2 MiB pages
//! `b<n>` from 0x5000_0000, a TD of 48 address bits with one vCPU.

mod matrix;
mod mrtd;
mod tables;
mod transcript;

use super::Case;
use gmem_core::addr::{Pfn, PfnRange};
use gmem_core::vendor::tdx::{Accepted, Config, Tdx};
use serde_json::Value;

pub(crate) use transcript::replay_transcript;

const TDR: u64 = 0x4000_0000;
const SMALL_PAGES: u64 = 0x4010_0000;
const LARGE_PAGES: u64 = 0x5000_0000;

/// One case per row, or `None` if the file has none of the shapes that this module knows.
pub(crate) fn replay(file: &Value) -> Option<Vec<Case>> {
    matrix::replay(file).or_else(|| mrtd::replay(file)).or_else(|| tables::replay(file))
}

/// The platform and TD of the recordings.
fn recorded_td() -> Tdx {
    let page = |hpa: u64| Pfn(hpa >> 12);
    let memory = PfnRange::new(page(TDR), page(0x8000_0000)).unwrap_or(PfnRange::page(page(TDR)));
    Tdx::new(Config { memory, tdr: page(TDR), ..Config::default() })
}

/// HPA of the 4 KiB page `p<n>`.
const fn small_page(n: u64) -> u64 {
    SMALL_PAGES.wrapping_add(n.wrapping_mul(1 << 12))
}

/// HPA of the 2 MiB page `b<n>`.
const fn large_page(n: u64) -> u64 {
    LARGE_PAGES.wrapping_add(n.wrapping_mul(1 << 21))
}

/// A TD exit in the recordings' words.
fn td_exit(accepted: Accepted) -> Option<String> {
    let Accepted::TdExit(exit) = accepted else { return None };
    let (gpa, asked, septe, level) = (exit.gpa, exit.requested_level, exit.septe, exit.level);
    Some(format!("TDEXIT(EPT_VIOLATION) gpa={gpa:x} req_level={asked} septe={septe:x} level={level} eeq_type=1"))
}

#[cfg(test)]
mod tests {
    use super::super::Mismatch;
    use super::*;

    const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../vectors/");

    fn assert_passes(cases: Option<Vec<Case>>, at_least: usize) {
        let cases = cases.expect("shape not recognised");
        for case in &cases {
            if let Err(Mismatch { expected, got }) = &case.outcome {
                panic!("{}: recorded {expected:?}, modelled {got}", case.name);
            }
        }
        assert!(cases.len() >= at_least, "only {} cases", cases.len());
    }

    fn read(name: &str) -> String {
        std::fs::read_to_string(format!("{VECTORS}{name}")).expect(name)
    }

    fn json(name: &str) -> Value {
        serde_json::from_str(&read(name)).expect(name)
    }

    #[test]
    fn every_row_of_the_state_matrix() {
        assert_passes(replay(&json("tdx_1_5_state_matrix.json")), 234);
    }

    #[test]
    fn every_measurement() {
        assert_passes(replay(&json("tdx_mrtd.json")), 6);
    }

    #[test]
    fn every_table_row() {
        assert_passes(replay(&json("tdx_sept_tables.json")), 250);
    }

    #[test]
    fn every_line_of_the_transcript() {
        let name = "tdx_1_5_transcript_aug_accept_demote_promote";
        let transcript = replay_transcript(&read(&format!("{name}.input.txt")), &read(&format!("{name}.txt")));
        assert_passes(transcript.map(|transcript| transcript.cases), 37);
    }

    #[test]
    fn a_wrong_recording_fails() {
        let mut file = json("tdx_1_5_state_matrix.json");
        file["rows"][0]["chldcnt_delta"] = Value::from(7);
        assert_eq!(replay(&file).unwrap().iter().filter(|case| case.outcome.is_err()).count(), 1);
        let wrong = replay_transcript("TRACK\nMADE.UP 1", "TRACK -> 0000000000000001 TDX_SUCCESS\nMADE.UP 1").unwrap();
        assert!(wrong.cases.iter().all(|case| case.outcome.is_err()));
    }

    #[test]
    fn other_files_are_left_to_others() {
        assert!(replay(&json("cca_rim_rmm1_0.json")).is_none());
        assert!(replay(&json("snp_launch_digest.json")).is_none());
        let name = "cca_rmm1_0_transcript_lifecycle";
        assert!(replay_transcript(&read(&format!("{name}.input.txt")), &read(&format!("{name}.txt"))).is_none());
    }
}
