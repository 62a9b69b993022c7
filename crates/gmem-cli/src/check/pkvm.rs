//! Replays the kernel's own test of page ownership at EL2, as it was transcribed step by step.

use super::Case;
use gmem_core::addr::{Gfn, Level, PageRange, Pfn, PfnRange};
use gmem_core::vendor::pkvm::{El2, Error, Physical, VmHandle};
use serde_json::Value;

const PFN: Pfn = Pfn(0x1000);
const GFN: Gfn = Gfn(0x10);
const VM: VmHandle = VmHandle(1);

/// Replays a JSON file, if it has this shape.
pub(crate) fn replay(file: &Value) -> Option<Vec<Case>> {
    let steps = file.get("steps").and_then(Value::as_array)?;
    let is_pkvm = steps.iter().any(|step| step["call"].as_str().is_some_and(|call| call.starts_with("__pkvm_")));
    if !is_pkvm {
        return None;
    }
    let mut el2 = initial(&file["notes"]["initial"]);
    Some(steps.iter().enumerate().map(|(number, step)| case(&mut el2, number, step)).collect())
}

/// The page under test belongs to the hypervisor, unless the file says otherwise.
fn initial(state: &Value) -> El2 {
    let memory = PfnRange::with_len(Pfn(0), 1 << 20).unwrap_or(PageRange::page(PFN));
    let mut el2 = El2::new(memory);
    el2.create_vm(VM);
    if state["host"] != "OWNED" {
        el2.reserve(PageRange::page(PFN));
    }
    el2
}

fn case(el2: &mut El2, number: usize, step: &Value) -> Case {
    let call = step["call"].as_str().unwrap_or("?");
    let args: Vec<&str> = step["args"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let name = format!("step {number}: {call}({})", args.join(", "));
    let result = match (&step["result"], &step["value"]) {
        (Value::String(result), _) => result.clone(),
        (_, Value::Number(value)) => value.to_string(),
        _ => "-".into(),
    };
    let got = run(el2, call, &args).unwrap_or_else(|| "the model has no such call".into());
    match &step["state_after"] {
        Value::Object(_) => {
            let expected = state(|side| step["state_after"][side].as_str().unwrap_or("?").to_owned());
            Case::compare(name, format!("{result} {expected}"), format!("{got} {}", model_state(el2)))
        }
        _ => Case::compare(name, result, got),
    }
}

fn state(of: impl Fn(&str) -> String) -> String {
    ["host", "hyp", "guest0", "guest1"].map(|side| format!("{side}={}", of(side))).join(" ")
}

fn model_state(el2: &El2) -> String {
    let page = el2.physical(PFN).unwrap_or(Physical::HOST);
    state(|side| {
        let state = match side {
            "host" => page.host,
            "hyp" => page.hyp,
            "guest0" => el2.guest_state(VM, GFN),
            _ => el2.guest_state(VM, Gfn(GFN.0 + 1)),
        };
        state.name().to_owned()
    })
}

/// Evaluates `name`, `name + N`, `name+N` or a number.
fn operand(text: &str, name: &str, base: u64) -> Option<u64> {
    let offset = text.strip_prefix(name)?.trim();
    match offset.strip_prefix('+') {
        Some(offset) => base.checked_add(offset.trim().parse().ok()?),
        None => offset.is_empty().then_some(base),
    }
}

fn pfn(text: &str) -> Option<Pfn> {
    operand(text, "pfn", PFN.0).or_else(|| operand(text, "phys", PFN.0)).map(Pfn)
}

fn gfn(text: &str) -> Option<Gfn> {
    operand(text, "gfn", GFN.0).map(Gfn)
}

fn pages(start: &str, count: &str) -> Option<PfnRange> {
    PageRange::with_len(pfn(start)?, count.parse().ok()?)
}

fn level(count: &str) -> Option<Level> {
    Level::ALL.into_iter().find(|level| level.pages().to_string() == count)
}

/// Makes the call; `None` if the model cannot express it. Calls without a result answer `-`.
fn run(el2: &mut El2, call: &str, args: &[&str]) -> Option<String> {
    let page = PageRange::page(PFN);
    let result = match (call, args) {
        ("check", []) => return Some("-".into()),
        ("expect_hyp_page_count", []) => return Some(el2.physical(PFN)?.pins.to_string()),
        ("expect_host_share_guest_count", []) => return Some(el2.physical(PFN)?.shares.to_string()),
        ("hyp_unpin_shared_mem", ["virt", "virt + size"]) => {
            el2.hyp_unpin_shared_mem(page);
            return Some("-".into());
        }
        ("hyp_pin_shared_mem", ["virt", "virt + size"]) => el2.hyp_pin_shared_mem(page),
        ("__pkvm_host_share_hyp", [at]) => el2.host_share_hyp(pfn(at)?),
        ("__pkvm_host_unshare_hyp", [at]) => el2.host_unshare_hyp(pfn(at)?),
        ("__pkvm_host_donate_hyp", [at, count]) => el2.host_donate_hyp(pages(at, count)?),
        ("__pkvm_hyp_donate_host", [at, count]) => el2.hyp_donate_host(pages(at, count)?),
        ("__pkvm_host_share_ffa", [at, count]) => el2.host_share_ffa(pages(at, count)?),
        ("__pkvm_host_unshare_ffa", [at, count]) => el2.host_unshare_ffa(pages(at, count)?),
        _ => guest_call(el2, call, args)?,
    };
    Some(print(result))
}

fn guest_call(el2: &mut El2, call: &str, args: &[&str]) -> Option<Result<(), Error>> {
    Some(match (call, args) {
        ("__pkvm_host_share_guest", [at, to, count, "vcpu", "prot"]) => {
            el2.host_share_guest(pfn(at)?, gfn(to)?, level(count)?, VM)
        }
        ("__pkvm_host_unshare_guest", [from, count, "vm"]) => el2.host_unshare_guest(gfn(from)?, level(count)?, VM),
        ("__pkvm_host_donate_guest", [at, to, "vcpu"]) => el2.host_donate_guest(pfn(at)?, gfn(to)?, VM),
        ("__pkvm_guest_share_host", ["vcpu", of]) => el2.guest_share_host(VM, gfn(of)?),
        ("__pkvm_guest_unshare_host", ["vcpu", of]) => el2.guest_unshare_host(VM, gfn(of)?),
        ("__pkvm_host_reclaim_page_guest", [of, "vm"]) => el2.host_reclaim_page_guest(gfn(of)?, VM).map(|_| ()),
        ("__pkvm_host_force_reclaim_page_guest", [at]) => el2.host_force_reclaim_page_guest(pfn(at)?),
        _ => return None,
    })
}

fn print(result: Result<(), Error>) -> String {
    match result {
        Ok(()) => "0".into(),
        Err(error) => format!("-{error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_of_the_selftest() {
        let path = format!("{}/../../vectors/pkvm_ownership_selftest.json", env!("CARGO_MANIFEST_DIR"));
        let file = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let cases = replay(&file).unwrap();
        assert_eq!(cases.len(), 107);
        for case in cases {
            if let Err(mismatch) = &case.outcome {
                panic!("{}\n  recorded {:?}\n  modelled {}", case.name, mismatch.expected, mismatch.got);
            }
        }
    }

    #[test]
    fn a_call_that_the_model_lacks_fails() {
        let file = serde_json::json!({ "steps": [{ "call": "__pkvm_host_dance", "args": [], "result": "0" }] });
        assert!(replay(&file).unwrap()[0].outcome.is_err());
    }
}
