//! `gmem measure tdx`: MRTD of a TD that is started from a TDVF image, an IGVM file or a list of pages.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use gmem_core::measure::igvm::Igvm;
use gmem_core::measure::tdx::{MeasuredPage, Mrtd, measure_tdvf};
use serde::Deserialize;
use serde_json::json;

use super::cca::parse_number;
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

#[derive(Deserialize)]
#[serde(untagged)]
enum PageList {
    Bare(Vec<Page>),
    Named { ops: Vec<Page> },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Page {
    gpa: String,
    measure: bool,
    content: Option<String>,
    file: Option<PathBuf>,
    #[serde(default)]
    offset: u64,
}

fn measure_list(list: &Path, on_page: &mut dyn FnMut(MeasuredPage)) -> Result<[u8; 48]> {
    let text = std::fs::read_to_string(list).with_context(|| list.display().to_string())?;
    let (PageList::Bare(pages) | PageList::Named { ops: pages }) =
        serde_json::from_str(&text).with_context(|| format!("{}: not a list of pages", list.display()))?;
    let mut mrtd = Mrtd::new();
    for page in &pages {
        let gpa = number(&page.gpa)?;
        if gpa % 4096 != 0 {
            bail!("{}: not the address of a page", page.gpa);
        }
        mrtd.page(gpa, page.measure.then_some(&contents(page, list)?));
        on_page(MeasuredPage { gpa, extended: page.measure, digest: mrtd.digest() });
    }
    Ok(mrtd.digest())
}

fn contents(page: &Page, list: &Path) -> Result<[u8; 4096]> {
    match (&page.content, &page.file) {
        (Some(_), Some(_)) => bail!("{}: both content and file", page.gpa),
        (Some(content), None) => {
            let byte =
                content.strip_prefix("all ").with_context(|| format!("content {content:?}: not \"all 0x..\""))?;
            Ok([u8::try_from(number(byte)?).context("content is more than a byte")?; 4096])
        }
        (None, Some(file)) => from_file(&list.parent().unwrap_or(Path::new("")).join(file), page.offset),
        (None, None) => Ok([0; 4096]),
    }
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

fn number(text: &str) -> Result<u64> {
    parse_number(text).with_context(|| format!("{text:?} is not a number"))
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
        assert!(measure("gpa", r#"[{"gpa": "0x10", "measure": true}]"#).0.is_err());
        assert!(measure("both", r#"[{"gpa": "0", "measure": true, "content": "all 0x1", "file": "x"}]"#).0.is_err());
        assert!(measure("byte", r#"[{"gpa": "0", "measure": true, "content": "all 0x100"}]"#).0.is_err());
        assert!(measure("ops", r#"{"ops": [{"gpa": "4096", "measure": false}]}"#).0.is_ok());
    }

    #[test]
    fn one_source_is_needed() {
        assert!(args(&[]).is_err());
        assert!(args(&["--tdvf", "a", "--pages", "b"]).is_err());
        assert!(run(&args(&["--tdvf", "/dev/null"]).unwrap()).is_err());
    }
}
