//! Replays SNP launch digests through the launch commands of the model.
//!
//! A vector is a list of pages under `pages`, `ops` or `steps`. A page is an object (type, gpa, contents, permissions,
//! and what is expected after it), the PAGE_INFO structure in hexadecimal, or a sentence for a run of equal pages.

use gmem_core::addr::{Gfn, Pfn, PfnRange};
use gmem_core::measure::sev::SevDigest;
use gmem_core::measure::snp::{ContentsHash, PageInfo, PageType, SnpDigest};
use gmem_core::vendor::snp::firmware::{LaunchStart, LaunchUpdate, Loaded, Machine, POLICY_RESERVED_ONE};
use gmem_core::vendor::snp::rmp::{Asid, RmpSize, RmpUpdate};
use serde_json::Value;

use super::Case;
use crate::measure::report::hex;

const LISTS: [&str; 6] = ["pages", "ops", "steps", "page_info_steps", "page_infos", "updates"];
const DIGESTS: [&str; 4] = ["launch_digest", "ld", "digest", "measurement"];
const DIGESTS_AFTER: [&str; 5] = ["digest_after", "ld_after", "launch_digest_after", "digest", "ld"];
const PAGE_INFOS: [&str; 2] = ["page_info_hex", "page_info"];
const HASHES: [&str; 5] = ["contents_sha384", "contents_hash", "contents", "page_sha384", "sha384"];
const BYTES: [&str; 6] = ["page_hex", "page_bytes_hex", "contents_hex", "vmsa_hex", "data_hex", "hex"];
const GUEST: Asid = Asid(1);
/// The guest's context; pages to load start at 0, on a 2 MiB boundary each.
const GCTX: Pfn = Pfn((1 << 35) - 1);

/// Replays a file of SNP, SEV or SEV-ES launch digests; `None` if it is of another shape.
pub(crate) fn replay(file: &Value) -> Option<Vec<Case>> {
    let vectors = ["vectors", "guests", "cases"].into_iter().find_map(|key| file.get(key)?.as_array())?;
    let known = |vector: &Value| text(vector, &DIGESTS).is_some() && steps(vector).is_some();
    if !vectors.iter().any(known) {
        return None;
    }
    Some(vectors.iter().enumerate().flat_map(|(index, vector)| replay_vector(index, vector)).collect())
}

fn text<'a>(of: &'a Value, keys: &[&str]) -> Option<&'a str> {
    keys.iter().find_map(|key| of.get(key)?.as_str())
}

fn steps(vector: &Value) -> Option<&Value> {
    LISTS.iter().find_map(|key| vector.get(key)).filter(|list| list.is_array() || list.is_string())
}

fn replay_vector(index: usize, vector: &Value) -> Vec<Case> {
    let name = text(vector, &["name", "id"]).map_or_else(|| format!("vector {index}"), str::to_owned);
    let expected = text(vector, &DIGESTS).unwrap_or_default().to_lowercase();
    let mut cases = Vec::new();
    let launch = steps(vector).ok_or("no list of pages".to_owned());
    let digest = launch.and_then(|steps| match expected.len() {
        64 => replay_sev(steps),
        _ => replay_snp(&name, vector, steps, &mut cases),
    });
    cases.push(Case::compare(name, expected, digest.unwrap_or_else(|error| error)));
    cases
}

/// SEV and SEV-ES: everything that is loaded is one stream of bytes.
fn replay_sev(steps: &Value) -> Result<String, String> {
    let mut digest = SevDigest::new();
    for step in steps.as_array().ok_or("steps are not a list")? {
        digest.update(&bytes(step, RmpSize::Page4K)?.ok_or("a step has no bytes")?);
    }
    Ok(hex(&digest.digest()))
}

fn replay_snp(name: &str, vector: &Value, steps: &Value, cases: &mut Vec<Case>) -> Result<String, String> {
    let mut launch = Launch::new()?;
    let after = vector.get("digest_after_each_page").and_then(Value::as_array);
    let single = [steps.clone()];
    for (index, step) in steps.as_array().map_or(&single[..], Vec::as_slice).iter().enumerate() {
        let step_name = format!("{name} step {index}");
        let sole_info = text(vector, &PAGE_INFOS).filter(|_| steps.as_array().is_some_and(|all| all.len() == 1));
        let expected_info = text(step, &PAGE_INFOS).or(sole_info);
        let info = launch.step(step)?;
        if let Some(expected) = expected_info {
            cases.push(Case::compare(format!("{step_name} PAGE_INFO"), expected.to_lowercase(), info));
        }
        let listed = after.and_then(|after| after.get(index)?.as_str());
        if let Some(expected) = listed.or_else(|| text(step, &DIGESTS_AFTER)) {
            cases.push(Case::compare(step_name, expected.to_lowercase(), launch.digest()));
        }
    }
    Ok(launch.digest())
}

/// A guest in its launch, and the next free host page.
///
/// Each page is measured twice: by the digest alone, and by the model that loads it. They have to agree for as long
/// as the recorded addresses are ones that a reverse map entry can hold.
struct Launch {
    machine: Machine,
    next: u64,
    digest: SnpDigest,
    loadable: bool,
}

/// One page, or 512 as one page of 2 MiB.
struct Load {
    info: PageInfo,
    size: RmpSize,
    contents: Contents,
}

enum Contents {
    Bytes(Vec<u8>),
    Hash(ContentsHash),
}

impl Launch {
    fn new() -> Result<Self, String> {
        let covered = PfnRange::page(Pfn(0)).hull(PfnRange::page(GCTX));
        let mut machine = Machine::new(covered);
        let start = LaunchStart { policy: POLICY_RESERVED_ONE, imi_enabled: false };
        machine.rmp.rmpupdate(GCTX, RmpUpdate::firmware()).map_err(debug)?;
        machine.gctx_create(GCTX).map_err(debug)?;
        machine.launch_start(GCTX, start).map_err(debug)?;
        machine.activate(GCTX, GUEST).map_err(debug)?;
        Ok(Self { machine, next: 0, digest: SnpDigest::new(), loadable: true })
    }

    fn digest(&self) -> String {
        hex(&self.digest.digest())
    }

    /// Replays one step and returns the PAGE_INFO of its last page.
    fn step(&mut self, step: &Value) -> Result<String, String> {
        if let Some(raw) = step.as_str().and_then(unhex).filter(|raw| raw.len() == 0x70) {
            return self.raw_page_info(&raw);
        }
        match step.as_str() {
            Some(sentence) => self.repeat(sentence),
            None => self.object(step),
        }
    }

    fn object(&mut self, step: &Value) -> Result<String, String> {
        let given = step.get("size").or_else(|| step.get("len"));
        let size = match number(given) {
            Some(0x1000) => RmpSize::Page4K,
            Some(0x20_0000) => RmpSize::Page2M,
            None if given.is_none() => RmpSize::Page4K,
            _ => return Err(format!("no page has size {given:?}")),
        };
        self.load(&Load { info: page_info(step)?, size, contents: contents(step, size)? })
    }

    /// A recorded structure: its digest has to be ours, the rest is loaded.
    fn raw_page_info(&mut self, raw: &[u8]) -> Result<String, String> {
        let kind = PageType::from_raw(raw[0x62]).ok_or("unknown page type")?;
        let gpa = u64::from_le_bytes(raw[0x68..].try_into().map_err(debug)?);
        let vmpl = raw[0x65..0x68].try_into().map_err(debug)?;
        let info = PageInfo { kind, gpa, imi: raw[0x63] & 1 != 0, vmpl };
        let hash = raw[0x30..0x60].try_into().map_err(debug)?;
        let ours = self.load(&Load { info, size: RmpSize::Page4K, contents: Contents::Hash(ContentsHash(hash)) })?;
        if ours == hex(raw) { Ok(ours) } else { Err(format!("PAGE_INFO {ours}")) }
    }

    /// `512 x NORMAL, gpa=0x200000+i*0x1000, page i filled with byte (i & 0xff)`
    fn repeat(&mut self, sentence: &str) -> Result<String, String> {
        let unknown = || format!("cannot read {sentence:?}");
        let (count, rest) = sentence.split_once(" x ").ok_or_else(unknown)?;
        let (kind, rest) = rest.split_once(", gpa=").ok_or_else(unknown)?;
        let (place, fill) = rest.split_once(", ").unwrap_or((rest, ""));
        let (start, step) = place.split_once("+i*").ok_or_else(unknown)?;
        let (start, step) = (parse_number(start).ok_or_else(unknown)?, parse_number(step).ok_or_else(unknown)?);
        let count: u64 = count.trim().parse().map_err(debug)?;
        let kind = named_type(kind).ok_or_else(unknown)?;
        let counting = fill.contains("(i & 0xff)");
        if !(counting || fill.is_empty()) {
            return Err(unknown());
        }
        let fill = |page: u64| if counting { page.to_le_bytes()[0] } else { 0 };
        let bytes = |page| vec![fill(page); 4096];
        let whole = count == 512 && step == 4096 && start.is_multiple_of(0x20_0000);
        if whole {
            let contents = Contents::Bytes((0..count).flat_map(bytes).collect());
            return self.load(&Load { info: PageInfo::new(kind, start), size: RmpSize::Page2M, contents });
        }
        (0..count).try_fold(String::new(), |_, page| {
            let info = PageInfo::new(kind, start.wrapping_add(page.wrapping_mul(step)));
            self.load(&Load { info, size: RmpSize::Page4K, contents: Contents::Bytes(bytes(page)) })
        })
    }

    fn load(&mut self, load: &Load) -> Result<String, String> {
        let info = self.measure(load);
        self.loadable &= load.info.gpa.is_multiple_of(4096) && load.info.gpa < 1 << 52;
        if self.loadable {
            self.load_into_model(load)?;
        }
        Ok(info)
    }

    fn measure(&mut self, load: &Load) -> String {
        let mut info = load.info;
        let mut encoded = String::new();
        for page in 0..load.size.pages() {
            let hash = load.contents.hash(info.kind, page);
            encoded = hex(&self.digest.encode(info, hash));
            self.digest.update_hashed(info, hash);
            info.gpa = info.gpa.wrapping_add(4096);
        }
        encoded
    }

    fn load_into_model(&mut self, load: &Load) -> Result<(), String> {
        let pfn = Pfn(self.next);
        self.next += 512;
        let update = RmpUpdate::private(Gfn::of_gpa(load.info.gpa), load.size, GUEST, true);
        self.machine.rmp.rmpupdate(pfn, update).map_err(debug)?;
        let contents = match &load.contents {
            // What is not measured is not recorded either, so that it cannot be a wrong CPUID table.
            _ if !load.info.kind.measures_contents() => Loaded::Bytes(&[]),
            Contents::Bytes(bytes) => Loaded::Bytes(bytes),
            Contents::Hash(hash) => Loaded::Hashed(*hash),
        };
        let PageInfo { kind, imi, vmpl, .. } = load.info;
        let update = LaunchUpdate { pfn, size: load.size, kind: kind.raw(), imi, vmpl, contents };
        self.machine.launch_update(GCTX, update).map_err(debug)?;
        let model = self.machine.guest(GCTX).map(|guest| guest.digest);
        if model == Some(self.digest) { Ok(()) } else { Err(format!("the model measures {model:?}")) }
    }
}

impl Contents {
    fn hash(&self, kind: PageType, page: u64) -> ContentsHash {
        match self {
            Self::Hash(hash) => *hash,
            Self::Bytes(bytes) => {
                let at = usize::try_from(page).map_or(usize::MAX, |page| page.saturating_mul(4096));
                ContentsHash::of(kind, bytes.get(at..).unwrap_or_default())
            }
        }
    }
}

fn page_info(step: &Value) -> Result<PageInfo, String> {
    let kind = ["type", "page_type", "kind"].iter().find_map(|key| step.get(key)).and_then(page_type);
    let gpa = number(step.get("gpa").or_else(|| step.get("address")));
    let small = |key: &str| match step.get(key) {
        None => Ok(0),
        value => number(value).and_then(|value| u8::try_from(value).ok()).ok_or_else(|| format!("{key} is not a byte")),
    };
    Ok(PageInfo {
        kind: kind.ok_or_else(|| format!("no page type in {step}"))?,
        gpa: gpa.ok_or_else(|| format!("no gpa in {step}"))?,
        imi: flag(step.get("imi").or_else(|| step.get("imi_page")))?,
        vmpl: [small("vmpl1")?, small("vmpl2")?, small("vmpl3")?],
    })
}

/// A bit as a boolean or a number.
fn flag(value: Option<&Value>) -> Result<bool, String> {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => Ok(false),
        Some(Value::Bool(true)) => Ok(true),
        other => match number(other) {
            Some(bit @ 0..=1) => Ok(bit == 1),
            _ => Err(format!("not a bit: {other:?}")),
        },
    }
}

fn page_type(kind: &Value) -> Option<PageType> {
    kind.as_str().map_or_else(
        || PageType::from_raw(u8::try_from(kind.as_u64()?).ok()?),
        |name| named_type(name).or_else(|| PageType::from_raw(u8::try_from(parse_number(name)?).ok()?)),
    )
}

fn named_type(name: &str) -> Option<PageType> {
    let name = name.trim().to_uppercase();
    PageType::ALL.into_iter().find(|kind| kind.name() == name.trim_start_matches("PAGE_TYPE_"))
}

fn contents(step: &Value, size: RmpSize) -> Result<Contents, String> {
    if let Some(bytes) = bytes(step, size)? {
        return Ok(Contents::Bytes(bytes));
    }
    let hash = text(step, &HASHES).and_then(unhex).and_then(|hash| hash.try_into().ok());
    Ok(hash.map_or_else(|| Contents::Bytes(Vec::new()), |hash| Contents::Hash(ContentsHash(hash))))
}

fn bytes(step: &Value, size: RmpSize) -> Result<Option<Vec<u8>>, String> {
    if let Some(fill) = number(step.get("fill_byte").or_else(|| step.get("fill"))) {
        let len = usize::try_from(size.pages()).map_err(debug)? * 4096;
        return Ok(Some(vec![u8::try_from(fill).map_err(debug)?; len]));
    }
    if let Some(page) = text(step, &["page", "data"]) {
        return filled(page).or_else(|| unhex(page)).map(Some).ok_or_else(|| format!("cannot read page {page:?}"));
    }
    let hex = text(step, &BYTES);
    hex.map(|hex| unhex(hex).ok_or_else(|| format!("not hexadecimal: {hex:.40}"))).transpose()
}

/// `4096 x 0xaa`
fn filled(page: &str) -> Option<Vec<u8>> {
    let (count, byte) = page.split_once(" x ")?;
    let count = parse_number(count).filter(|count| *count <= 0x20_0000)?;
    Some(vec![u8::try_from(parse_number(byte)?).ok()?; usize::try_from(count).ok()?])
}

fn number(value: Option<&Value>) -> Option<u64> {
    value.and_then(|value| value.as_u64().or_else(|| parse_number(value.as_str()?)))
}

fn parse_number(text: &str) -> Option<u64> {
    let text = text.trim();
    text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok())
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let digits: Vec<u8> = text.as_bytes().iter().map(digit).collect::<Option<_>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    rest.is_empty().then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

fn debug(error: impl std::fmt::Debug) -> String {
    format!("{error:?}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn vectors(name: &str) -> Value {
        let path = format!("{}/../../vectors/{name}", env!("CARGO_MANIFEST_DIR"));
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    fn failures(cases: &[Case]) -> Vec<&Case> {
        cases.iter().filter(|case| case.outcome.is_err()).collect()
    }

    #[test]
    fn every_recorded_digest_is_reproduced() {
        for (file, least) in [("snp_launch_digest.json", 15), ("snp_launch_digest_extra.json", 9)] {
            let cases = replay(&vectors(file)).unwrap();
            assert!(failures(&cases).is_empty(), "{file}: {:#?}", failures(&cases));
            assert!(cases.len() >= least, "{file}: only {} cases", cases.len());
        }
    }

    #[test]
    fn a_wrong_digest_and_an_unknown_page_fail() {
        let mut file = vectors("snp_launch_digest.json");
        file["vectors"][1]["launch_digest"] = json!("00".repeat(48));
        file["vectors"][2]["pages"][0]["type"] = json!("NOVEL");
        assert_eq!(failures(&replay(&file).unwrap()).len(), 2);
    }

    #[test]
    fn recorded_structures_are_replayed() {
        let file = vectors("snp_launch_digest_extra.json");
        let vector = &file["vectors"][0];
        let steps = json!({"vectors": [{
            "name": "raw", "steps": [vector["page_info_hex"]], "launch_digest": vector["launch_digest"],
        }]});
        let cases = replay(&steps).unwrap();
        assert!(failures(&cases).is_empty(), "{cases:#?}");
    }

    #[test]
    fn addresses_that_no_entry_holds_are_measured_all_the_same() {
        let mut digest = SnpDigest::new();
        let gpa = 0xffff_ffff_ffff_f000;
        digest.update(PageInfo::new(PageType::Zero, gpa), &[]);
        let file = json!({"vectors": [{
            "pages": [{"type": "ZERO", "gpa": format!("{gpa:#x}")}], "launch_digest": hex(&digest.digest()),
        }]});
        assert!(failures(&replay(&file).unwrap()).is_empty());
    }

    #[test]
    fn sev_loads_are_one_stream() {
        let file = json!({"vectors": [{
            "steps": [{"data_hex": "61"}, {"data_hex": "6263"}],
            "launch_digest": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        }]});
        assert!(failures(&replay(&file).unwrap()).is_empty());
    }

    #[test]
    fn other_shapes_are_left_to_others() {
        assert!(replay(&vectors("tdx_mrtd.json")).is_none());
        assert!(replay(&vectors("cca_rim_rmm1_0.json")).is_none());
        assert!(replay(&vectors("pkvm_ownership_selftest.json")).is_none());
        assert!(replay(&json!([1, 2])).is_none());
    }
}
