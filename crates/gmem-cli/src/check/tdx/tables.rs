//! The module's own tables: entry states, what is allowed from and during which state, codes.

use super::Case;
use gmem_core::vendor::tdx::sept::{SeptFlags, SeptState};
use gmem_core::vendor::tdx::status::TdxStatus;
use gmem_core::vendor::tdx::tables::{Leaf, OpState, SEAMCALLS, TDCALLS};
use serde_json::{Map, Value};

type Object = Map<String, Value>;

pub(super) fn replay(file: &Value) -> Option<Vec<Case>> {
    let object = |key: &str| file.get(key)?.as_object();
    let mut cases: Vec<_> = object("sept_states")?.iter().map(|(name, facts)| state(name, facts)).collect();
    cases.extend(rows(object("seamcall_allowed_from_sept_state"), &SEAMCALLS, from_states));
    cases.extend(rows(object("tdcall_allowed_from_sept_state"), &TDCALLS, from_states));
    cases.extend(rows(object("seamcall_allowed_in_op_state"), &SEAMCALLS, during_states));
    cases.extend(file.get("op_states_requiring_tlb_tracking").map(tracking));
    cases.extend(object("error_codes").into_iter().flatten().map(|(name, code)| status(name, code)));
    Some(cases)
}

fn state(name: &str, facts: &Value) -> Case {
    let expected: Object = facts.as_object().cloned().unwrap_or_default();
    let found = SeptState::ALL.into_iter().find(|state| state.facts().name == name);
    let got: Object = expected.keys().map(|key| (key.clone(), found.map_or(Value::Null, |s| fact(s, key)))).collect();
    Case::compare(name, Value::from(expected).to_string(), Value::from(got).to_string())
}

fn fact(state: SeptState, key: &str) -> Value {
    let facts = state.facts();
    match key {
        "encoding" => Value::from(format!("{:#x}", facts.encoding)),
        "index" => Value::from(state as u8),
        "public_state" => Value::from(facts.public),
        flag => SeptFlags::from_name(&flag.to_uppercase())
            .map_or(Value::Null, |flag| Value::from(u8::from(facts.flags.contains(flag)))),
    }
}

fn rows(file: Option<&Object>, leaves: &'static [Leaf], allowed: fn(&Leaf) -> Vec<&'static str>) -> Vec<Case> {
    let case = |(name, states): (&String, &Value)| {
        let leaf = leaves.iter().find(|leaf| leaf.name == name.replace('_', "."));
        Case::compare(name, names(states), leaf.map_or("no such leaf".to_owned(), |leaf| sorted(allowed(leaf))))
    };
    file.into_iter().flatten().map(case).collect()
}

fn from_states(leaf: &Leaf) -> Vec<&'static str> {
    let allowed = SeptState::ALL.into_iter().filter(|state| leaf.allowed_from(*state) == Some(true));
    allowed.map(|state| state.facts().name).collect()
}

fn during_states(leaf: &Leaf) -> Vec<&'static str> {
    OpState::ALL
        .into_iter()
        .filter(|(_, state)| leaf.allowed_during(*state) == Some(true))
        .map(|(name, _)| name)
        .collect()
}

fn tracking(states: &Value) -> Case {
    let required = OpState::ALL.into_iter().filter(|(_, state)| state.requires_tracking());
    Case::compare("states that require tracking", names(states), sorted(required.map(|(name, _)| name).collect()))
}

fn status(name: &str, code: &Value) -> Case {
    let found = TdxStatus::ALL.iter().find(|(known, _)| *known == name);
    let got = found.map_or("no such code".to_owned(), |(_, code)| format!("0x{:016X}", code.0));
    Case::compare(name, code.as_str().unwrap_or_default(), got)
}

fn names(list: &Value) -> String {
    sorted(list.as_array().into_iter().flatten().filter_map(Value::as_str).collect())
}

fn sorted(mut names: Vec<&str>) -> String {
    names.sort_unstable();
    names.join(" ")
}
