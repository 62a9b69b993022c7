//! `gmem measure cca`: the Realm Initial Measurement of a list of RMI steps.

use anyhow::{Context, Result, anyhow, bail, ensure};
use gmem_core::measure::cca::{HashAlgo, RealmParams, RecParams, Rim, Step, ripas_entries};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

use super::report::{OutputArgs, Report, stdout};

const PAGE: usize = 4096;

/// Arguments of `gmem measure cca`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// JSON file: a list of steps, or an object whose `ops` is one. The first step is `realm_create` with `hash_algo` (0
    /// SHA-256, 1 SHA-512), `flags`, `s2sz`, `num_bps`, `num_wps`, `pmu_num_ctrs`, `sve_vl`; then come `data` (`ipa`,
    /// `flags`, and `fill_byte` or `file` with `offset`), `ripas` (`base`, `top`) and `rec` (`flags`, `pc`, `gprs`).
    steps: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs the command; the result goes to standard output.
pub(crate) fn run(args: &Args) -> Result<()> {
    let text = std::fs::read_to_string(&args.steps).with_context(|| format!("{}", args.steps.display()))?;
    let file: Value = serde_json::from_str(&text).with_context(|| format!("{}", args.steps.display()))?;
    let folder = args.steps.parent().unwrap_or(Path::new("."));
    let list = file.get("ops").unwrap_or(&file).as_array().ok_or_else(|| anyhow!("no list of steps"))?;
    let mut report = Report::new("CCA", &args.output, stdout());
    let rim = measure(list, folder, |what, rim| {
        report.step(rim.value(), || format!("{what:<37}"), || json!({ "step": what }));
    })?;
    report.finish(rim.value())
}

/// A number, or a string with a decimal or `0x` hexadecimal one.
pub(crate) fn number(value: &Value) -> Option<u64> {
    match value {
        Value::String(text) => parse_number(text),
        value => value.as_u64(),
    }
}

/// A decimal or `0x` hexadecimal number.
pub(crate) fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn field(op: &Value, name: &str) -> Result<u64> {
    let value = op.get(name).ok_or_else(|| anyhow!("no {name:?} in {op}"))?;
    number(value).ok_or_else(|| anyhow!("{name:?} is not a number in {op}"))
}

fn field_or_zero(op: &Value, name: &str) -> Result<u64> {
    if op.get(name).is_some() { field(op, name) } else { Ok(0) }
}

fn byte(op: &Value, name: &str) -> Result<u8> {
    u8::try_from(field_or_zero(op, name)?).map_err(|_| anyhow!("{name:?} is too large in {op}"))
}

/// Measures a list of steps; `on_step` gets each measured step in words and the measurement after it.
pub(crate) fn measure(ops: &[Value], folder: &Path, mut on_step: impl FnMut(String, &Rim)) -> Result<Rim> {
    let mut rim: Option<Rim> = None;
    for op in ops {
        if let Some(rim) = &mut rim {
            apply(rim, op, folder, &mut on_step)?;
        } else {
            let created = Rim::new(&realm_params(op)?);
            on_step("realm_create".into(), &created);
            rim = Some(created);
        }
    }
    rim.ok_or_else(|| anyhow!("no steps"))
}

/// The parameters of a `realm_create` step.
pub(crate) fn realm_params(op: &Value) -> Result<RealmParams> {
    ensure!(op["op"] == "realm_create", "the first step must be realm_create, not {op}");
    let algo = field(op, "hash_algo")?;
    Ok(RealmParams {
        flags: field_or_zero(op, "flags")?,
        s2sz: byte(op, "s2sz")?,
        sve_vl: byte(op, "sve_vl")?,
        num_bps: byte(op, "num_bps")?,
        num_wps: byte(op, "num_wps")?,
        pmu_num_ctrs: byte(op, "pmu_num_ctrs")?,
        hash_algo: HashAlgo::from_raw(algo).ok_or_else(|| anyhow!("RMM 1.0 has no hash_algo {algo}"))?,
    })
}

/// Extends `rim` by one step of the list.
pub(crate) fn apply(rim: &mut Rim, op: &Value, folder: &Path, on_step: &mut impl FnMut(String, &Rim)) -> Result<()> {
    match op["op"].as_str() {
        Some("data") => apply_data(rim, op, folder, on_step),
        Some("ripas") => apply_ripas(rim, op, on_step),
        Some("rec") => {
            rim.extend(&Step::Rec(rec_params(op)?));
            on_step(format!("rec pc {:#x}", field_or_zero(op, "pc")?), rim);
            Ok(())
        }
        _ => bail!("unknown step {op}"),
    }
}

fn rec_params(op: &Value) -> Result<RecParams> {
    let mut gprs = [0; 8];
    let given = op.get("gprs").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    ensure!(given.len() <= gprs.len(), "more than 8 gprs in {op}");
    for (register, value) in gprs.iter_mut().zip(given) {
        *register = number(value).ok_or_else(|| anyhow!("a gpr is not a number in {op}"))?;
    }
    Ok(RecParams { flags: field(op, "flags")?, pc: field_or_zero(op, "pc")?, gprs })
}

fn apply_ripas(rim: &mut Rim, op: &Value, on_step: &mut impl FnMut(String, &Rim)) -> Result<()> {
    let (base, top) = (field(op, "base")?, field(op, "top")?);
    ensure!((base | top) % 4096 == 0 && base < top, "not a range of granules: {op}");
    for step in ripas_entries(base, top) {
        rim.extend(&step);
        if let Step::Ripas { base, top } = step {
            on_step(format!("ripas {base:#x} to {top:#x}"), rim);
        }
    }
    Ok(())
}

fn apply_data(rim: &mut Rim, op: &Value, folder: &Path, on_step: &mut impl FnMut(String, &Rim)) -> Result<()> {
    let (ipa, flags) = (field(op, "ipa")?, field(op, "flags")?);
    ensure!(flags <= 1 && ipa % 4096 == 0, "not a DATA granule: {op}");
    let kind = if flags == 1 { "measured" } else { "address only" };
    for (page, content) in (0..).zip(contents(op, folder)?) {
        let ipa = ipa.checked_add(page * PAGE as u64).ok_or_else(|| anyhow!("the address wraps: {op}"))?;
        rim.extend(&Step::Data { ipa, flags, content: &content });
        on_step(format!("data {ipa:#x} {kind}"), rim);
    }
    Ok(())
}

/// The granules of a `data` step, the last one padded with zeros.
fn contents(op: &Value, folder: &Path) -> Result<Vec<[u8; PAGE]>> {
    let Some(file) = op.get("file").and_then(Value::as_str) else {
        field(op, "fill_byte")?;
        return Ok(vec![[byte(op, "fill_byte")?; PAGE]]);
    };
    let path = folder.join(file);
    let bytes = std::fs::read(&path).with_context(|| format!("{}", path.display()))?;
    let offset = usize::try_from(field_or_zero(op, "offset")?)?;
    let bytes = bytes.get(offset..).filter(|bytes| !bytes.is_empty());
    let pages = bytes.ok_or_else(|| anyhow!("{} ends before offset {offset:#x}", path.display()))?.chunks(PAGE);
    Ok(pages.map(|bytes| std::array::from_fn(|at| bytes.get(at).copied().unwrap_or(0))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ops(text: &str) -> Vec<Value> {
        serde_json::from_str(text).unwrap()
    }

    const CREATE: &str = r#"{"op":"realm_create","hash_algo":0,"s2sz":48,"num_bps":1,"num_wps":1}"#;

    #[test]
    fn numbers_may_be_strings() {
        let strings = format!(r#"[{CREATE},{{"op":"data","ipa":"0x1000","fill_byte":2,"flags":"1"}}]"#);
        let numbers = format!(r#"[{CREATE},{{"op":"data","ipa":4096,"fill_byte":2,"flags":1}}]"#);
        let run = |text: &str| measure(&ops(text), Path::new("."), |_, _| ()).unwrap();
        assert_eq!(run(&strings), run(&numbers));
    }

    #[test]
    fn a_range_is_explained_entry_by_entry() {
        let text = format!(r#"[{CREATE},{{"op":"ripas","base":"0x1ff000","top":"0x400000"}}]"#);
        let mut seen = Vec::new();
        measure(&ops(&text), Path::new("."), |what, _| seen.push(what)).unwrap();
        assert_eq!(seen, ["realm_create", "ripas 0x1ff000 to 0x200000", "ripas 0x200000 to 0x400000"]);
    }

    #[test]
    fn wrong_steps_are_named() {
        for (text, problem) in [
            ("[]", "no steps"),
            (r#"[{"op":"data"}]"#, "the first step must be realm_create"),
            (r#"[{"op":"realm_create","hash_algo":2}]"#, "RMM 1.0 has no hash_algo 2"),
        ] {
            let error = measure(&ops(text), Path::new("."), |_, _| ()).unwrap_err();
            assert!(error.to_string().contains(problem), "{error}");
        }
    }
}
