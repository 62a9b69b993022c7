//! `gmem measure tdx`: MRTD of a TD that is started from a TDVF image, an IGVM file or a list of pages.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use gmem_core::measure::igvm::Igvm;
use gmem_core::measure::tdx::{MeasuredPage, Mrtd, measure_tdvf};
use serde_json::{Map, Value, json};

use super::cca::{self, parse_number};
use super::read_image;
use super::report::{OutputArgs, Report, stdout};

/// Which launch to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct TdxArgs {
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Source {
    /// A TDVF image (OVMF for TDX, td-shim).
    #[arg(long, value_name = "FILE")]
    tdvf: Option<PathBuf>,
    /// An IGVM file.
    #[arg(long, value_name = "FILE")]
    igvm: Option<PathBuf>,
    /// A JSON list of {"gpa", "measure", "content"}, in the order of their addition. Contents are "all 0x5a", or the bytes
    /// of "file" from "offset"; zeros without either.
    #[arg(long, value_name = "FILE")]
    pages: Option<PathBuf>,
}

/// Prints the measurement.
///
/// # Errors
/// A file cannot be read or does not have its format.
pub(crate) fn run(args: &TdxArgs) -> Result<()> {
    let mut report = Report::new("TDX", &args.output, stdout());
    let mrtd = measure(&args.source, &mut |page: MeasuredPage| {
        let (gpa, measured) = (page.gpa, page.extended);
        let words = || format!("{gpa:#014x} {:11}", if measured { "add, extend" } else { "add" });
        report.step(&page.digest, words, || json!({"gpa": format!("{gpa:#x}"), "measured": measured}));
    })?;
    report.finish(&mrtd)
}

fn measure(source: &Source, on_page: &mut dyn FnMut(MeasuredPage)) -> Result<[u8; 48]> {
    if let Some(list) = &source.pages {
        return measure_list(list, on_page);
    }
    let file = source.tdvf.as_ref().or(source.igvm.as_ref()).context("--tdvf, --igvm or --pages is needed")?;
    let named = || file.display().to_string();
    let bytes = read_image(file)?;
    if source.igvm.is_some() {
        return Igvm::parse(&bytes).and_then(|igvm| igvm.measure_tdx(on_page)).with_context(named);
    }
    measure_tdvf(&bytes, on_page).with_context(named)
}

/// An entry of a list.
struct Page {
    gpa: u64,
    measure: bool,
    content: Content,
}

enum Content {
    /// The same byte everywhere.
    All(u8),
    /// One page of a file, from an offset.
    File(PathBuf, u64),
}

const FIELDS: [&str; 5] = ["gpa", "measure", "content", "file", "offset"];

impl Page {
    fn new(entry: &Value) -> Result<Self> {
        let fields = entry.as_object().context("not an object")?;
        if let Some(name) = fields.keys().find(|name| !FIELDS.contains(&name.as_str())) {
            bail!("there is no field {name:?}, only {}", FIELDS.join(", "));
        }
        let gpa = number(fields, "gpa")?.context("\"gpa\" is missing")?;
        ensure!(gpa % 4096 == 0, "\"gpa\" is {}, not the address of a page", fields["gpa"]);
        let measure = fields.get("measure").context("\"measure\" is missing")?;
        let measure = measure.as_bool().with_context(|| format!("\"measure\" is {measure}, not true or false"))?;
        Ok(Self { gpa, measure, content: Content::new(fields)? })
    }

    fn bytes(&self, folder: &Path) -> Result<[u8; 4096]> {
        match &self.content {
            Content::All(byte) => Ok([*byte; 4096]),
            Content::File(file, offset) => from_file(&folder.join(file), *offset),
        }
    }
}

impl Content {
    fn new(fields: &Map<String, Value>) -> Result<Self> {
        match (text(fields, "content")?, text(fields, "file")?) {
            (Some(_), Some(_)) => bail!("both \"content\" and \"file\""),
            (Some(content), None) => Self::all(content),
            (None, Some(file)) => Ok(Self::File(file.into(), number(fields, "offset")?.unwrap_or(0))),
            (None, None) => Ok(Self::All(0)),
        }
    }

    fn all(content: &str) -> Result<Self> {
        let byte = content.strip_prefix("all ").and_then(parse_number).and_then(|byte| u8::try_from(byte).ok());
        byte.map(Self::All)
            .with_context(|| format!("\"content\" is {content:?}, not \"all \" and a byte, such as \"all 0x5a\""))
    }
}

/// A field that may be null, as if it were not there.
fn optional<'f>(fields: &'f Map<String, Value>, name: &str) -> Option<&'f Value> {
    fields.get(name).filter(|value| !value.is_null())
}

fn number(fields: &Map<String, Value>, name: &str) -> Result<Option<u64>> {
    let read = |value| cca::number(value).with_context(|| format!("{name:?} is {value}, not a number"));
    optional(fields, name).map(read).transpose()
}

fn text<'f>(fields: &'f Map<String, Value>, name: &str) -> Result<Option<&'f str>> {
    let read = |value: &'f Value| value.as_str().with_context(|| format!("{name:?} is {value}, not a string"));
    optional(fields, name).map(read).transpose()
}

/// The entries of a list, or of an object whose `ops` is one.
fn entries(file: &Value) -> Result<Vec<Page>> {
    let list = file.get("ops").unwrap_or(file).as_array().context("not a list of pages")?;
    let page = |(at, entry)| Page::new(entry).with_context(|| format!("entry {at}"));
    (1..).zip(list).map(page).collect()
}

fn measure_list(list: &Path, on_page: &mut dyn FnMut(MeasuredPage)) -> Result<[u8; 48]> {
    let named = || list.display().to_string();
    let text = std::fs::read_to_string(list).with_context(named)?;
    let pages = serde_json::from_str(&text).map_err(Into::into).and_then(|file| entries(&file)).with_context(named)?;
    let folder = list.parent().unwrap_or(Path::new(""));
    let mut mrtd = Mrtd::new();
    for page in &pages {
        mrtd.page(page.gpa, page.measure.then_some(&page.bytes(folder)?));
        on_page(MeasuredPage { gpa: page.gpa, extended: page.measure, digest: mrtd.digest() });
    }
    Ok(mrtd.digest())
}

/// One page of a file; zeros where the file ends early.
fn from_file(path: &Path, offset: u64) -> Result<[u8; 4096]> {
    let named = || path.display().to_string();
    let (mut bytes, mut page) = (Vec::new(), [0; 4096]);
    let mut file = std::fs::File::open(path).with_context(named)?;
    file.seek(SeekFrom::Start(offset)).with_context(named)?;
    file.take(4096).read_to_end(&mut bytes).with_context(named)?;
    ensure!(!bytes.is_empty(), "{}: ends before {offset:#x}", path.display());
    page.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::super::report::hex;
    use super::*;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: TdxArgs,
    }

    fn args(arguments: &[&str]) -> Result<TdxArgs, clap::Error> {
        Cli::try_parse_from(std::iter::once("tdx").chain(arguments.iter().copied())).map(|cli| cli.args)
    }

    fn measure(name: &str, list: &str) -> (Result<[u8; 48]>, Vec<MeasuredPage>) {
        let path = std::env::temp_dir().join(format!("gmem-{}-{name}.json", std::process::id()));
        std::fs::write(&path, list).unwrap();
        let mut pages = Vec::new();
        let mrtd = measure_list(&path, &mut |page| pages.push(page));
        std::fs::remove_file(path).unwrap();
        (mrtd, pages)
    }

    /// The vector "two_pages_measured" of tdx_mrtd.json.
    const TWO_PAGES: &str = r#"[{"gpa": "0x1000", "measure": true, "content": "all 0x01"},
        {"gpa": "0x2000", "measure": true, "content": "all 0x02"}]"#;
    const TWO_PAGES_MRTD: &str =
        "cd42868938e3c4ecfe1ed82cdafd279aa495b1edff67088ab38bd0a69ba792b249245408961412e165b20291d22ac1fe";

    #[test]
    fn a_list_of_pages_is_measured_page_by_page() {
        let (mrtd, pages) = measure("explained", TWO_PAGES);
        assert_eq!(hex(&mrtd.unwrap()), TWO_PAGES_MRTD);
        assert_eq!(pages.iter().map(|page| page.gpa).collect::<Vec<_>>(), [0x1000, 0x2000]);
        assert_eq!(hex(&pages[1].digest), TWO_PAGES_MRTD);
    }

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        for (list, problem) in [
            (r#"7"#, "not a list of pages"),
            (r#"[{"gpa": "0", "measure": true}, 7]"#, "entry 2: not an object"),
            (r#"[{"gpa": "0x10", "measure": true}]"#, r#"entry 1: "gpa" is "0x10", not the address of a page"#),
            (r#"[{"measure": true}]"#, r#"entry 1: "gpa" is missing"#),
            (r#"[{"gpa": "x", "measure": true}]"#, r#"entry 1: "gpa" is "x", not a number"#),
            (r#"[{"gpa": "0"}]"#, r#"entry 1: "measure" is missing"#),
            (r#"[{"gpa": "0", "measure": 1}]"#, r#"entry 1: "measure" is 1, not true or false"#),
            (r#"[{"gpa": "0", "measure": true, "contents": "all 0x1"}]"#, r#"entry 1: there is no field "contents""#),
            (r#"[{"gpa": "0", "measure": true, "content": "all 0x1", "file": "x"}]"#, r#"both "content" and "file""#),
            (r#"[{"gpa": "0", "measure": true, "content": "all 0x100"}]"#, r#"entry 1: "content" is "all 0x100", not"#),
        ] {
            let error = format!("{:#}", measure("wrong", list).0.unwrap_err());
            assert!(error.contains(problem), "{list}: {error}");
        }
        assert!(measure("ops", r#"{"ops": [{"gpa": "4096", "measure": false}]}"#).0.is_ok());
    }

    #[test]
    fn one_source_is_needed() {
        assert!(args(&[]).is_err());
        assert!(args(&["--tdvf", "a", "--pages", "b"]).is_err());
        assert!(run(&args(&["--tdvf", "/dev/null"]).unwrap()).is_err());
    }
}
