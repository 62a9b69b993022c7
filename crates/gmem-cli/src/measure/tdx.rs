//! `gmem measure tdx`: MRTD of a TD that is started from a TDVF image or a list of pages.

use anyhow::{Context, Result, bail};
use gmem_core::measure::tdx::{MeasuredPage, Mrtd, measure_tdvf};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Which launch to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct TdxArgs {
    #[command(flatten)]
    source: Source,
    /// Print a JSON object instead of the bare digest.
    #[arg(long)]
    json: bool,
    /// Print every page with the digest after it.
    #[arg(long)]
    explain: bool,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Source {
    /// A TDVF image (OVMF for TDX, td-shim).
    #[arg(long, value_name = "FILE")]
    tdvf: Option<PathBuf>,
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
    let mut pages = Vec::new();
    let mut on_page = |page| pages.push(page);
    let mrtd = match (&args.source.tdvf, &args.source.pages) {
        (Some(image), _) => {
            let bytes = std::fs::read(image).with_context(|| image.display().to_string())?;
            measure_tdvf(&bytes, &mut on_page).with_context(|| image.display().to_string())?
        }
        (None, Some(list)) => measure_list(list, &mut on_page)?,
        (None, None) => bail!("give --tdvf or --pages"),
    };
    print!("{}", report(args, &mrtd, &pages));
    Ok(())
}

fn report(args: &TdxArgs, mrtd: &[u8; 48], pages: &[MeasuredPage]) -> String {
    if args.json {
        let page = |page: &MeasuredPage| {
            let (gpa, digest) = (format!("{:#x}", page.gpa), hex(&page.digest));
            serde_json::json!({ "gpa": gpa, "measured": page.extended, "digest": digest })
        };
        let mut object = serde_json::json!({ "mrtd": hex(mrtd) });
        if args.explain {
            object["pages"] = pages.iter().map(page).collect();
        }
        return format!("{object:#}\n");
    }
    let explained = pages.iter().filter(|_| args.explain).map(|page| {
        let what = if page.extended { "add, extend" } else { "add" };
        format!("{:#014x} {what:11} {}\n", page.gpa, hex(&page.digest))
    });
    explained.chain([format!("{}\n", hex(mrtd))]).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
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
fn from_file(file: &Path, offset: u64) -> Result<[u8; 4096]> {
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    let rest = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..));
    let rest = rest.with_context(|| format!("{}: ends before {offset:#x}", file.display()))?;
    let mut page = [0; 4096];
    page.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    Ok(page)
}

fn number(text: &str) -> Result<u64> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.with_context(|| format!("{text:?} is not a number"))
}

#[cfg(test)]
mod tests {
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
    fn a_list_of_pages_is_measured_and_explained() {
        let (mrtd, pages) = measure("explained", TWO_PAGES);
        let mrtd = mrtd.unwrap();
        assert_eq!(hex(&mrtd), TWO_PAGES_MRTD);
        let plain = report(&args(&["--pages", "x"]).unwrap(), &mrtd, &pages);
        assert_eq!(plain, format!("{TWO_PAGES_MRTD}\n"));
        let explained = report(&args(&["--pages", "x", "--explain"]).unwrap(), &mrtd, &pages);
        assert_eq!(explained.lines().count(), 3);
        assert!(explained.starts_with("0x000000001000 add, extend "));
        let json = report(&args(&["--pages", "x", "--json", "--explain"]).unwrap(), &mrtd, &pages);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["mrtd"], TWO_PAGES_MRTD);
        assert_eq!(json["pages"][1]["digest"], TWO_PAGES_MRTD);
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
