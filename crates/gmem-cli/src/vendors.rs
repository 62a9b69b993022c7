//! `gmem vendors`: what happens to a guest's memory, per architecture.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::ValueEnum;
use gmem_core::vendor::consequences::{Architecture, Consequence, Event, Guest, Told, scenario};
use gmem_core::vendor::{Cause, ExitReason, GuestException, HostOutcome, Refusal, Status};
use serde_json::{Value, json};

/// Show what punching, zapping, converting and touching a page costs a guest on each architecture.
///
/// Every answer comes from running the models: a guest uses one page, the event happens, the guest (or the host) touches
/// the page again. A cell says whether the guest's bytes are gone, how the guest goes on, and who is told of it how.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only these architectures.
    #[arg(value_name = "ARCHITECTURE")]
    architectures: Vec<Column>,
    /// Machine-readable output.
    #[arg(long)]
    json: bool,
}

/// An architecture as an argument.
#[derive(Clone, Debug)]
struct Column(Architecture);

impl ValueEnum for Column {
    fn value_variants<'a>() -> &'a [Self] {
        const ALL: [Column; 8] = {
            let [a, b, c, d, e, f, g, h] = Architecture::ALL;
            [Column(a), Column(b), Column(c), Column(d), Column(e), Column(f), Column(g), Column(h)]
        };
        &ALL
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        Some(clap::builder::PossibleValue::new(self.0.name()))
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mut columns: Vec<_> = arguments.architectures.iter().map(|column| column.0).collect();
    if columns.is_empty() {
        columns.extend(Architecture::ALL);
    }
    let mut out = std::io::stdout().lock();
    if arguments.json {
        let rows: Vec<_> = Event::ALL.into_iter().map(|event| json_row(event, &columns)).collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
    } else {
        write!(out, "{}", table(&columns))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn json_row(event: Event, columns: &[Architecture]) -> Value {
    let cells = columns.iter().map(|column| (column.name().to_owned(), json_cell(scenario(*column, event))));
    json!({ "event": event.name(), "consequences": cells.collect::<serde_json::Map<_, _>>() })
}

fn json_cell(cell: Option<Consequence>) -> Value {
    cell.map_or(Value::Null, |cell| {
        let refusal = match cell.told {
            Told::Vmm(refusal) => Some(refusal),
            _ => None,
        };
        json!({
            "content_lost": cell.lost,
            "guest": guest(cell.guest),
            "told": told(cell.told),
            "errno": refusal.map(|refusal| errno(refusal.cause)),
            "status": refusal.and_then(status),
            "host_read": host(cell.host),
        })
    })
}

/// One block per event, one line per architecture: eight columns of sentences fit no terminal.
fn table(columns: &[Architecture]) -> String {
    let width = columns.iter().map(|column| column.name().len()).max().unwrap_or(0);
    let mut text = String::new();
    for event in Event::ALL {
        text += &format!("{}\n", event.name());
        for column in columns {
            text += &format!("  {:width$}  {}\n", column.name(), cell(scenario(*column, event)));
        }
    }
    text
}

fn cell(cell: Option<Consequence>) -> String {
    let Some(cell) = cell else { return "cannot happen: private memory is mapped in 4 KiB pages only".to_owned() };
    let content = if cell.lost { "content lost" } else { "content kept" };
    format!(
        "{content:12}  guest {:34}  told: {}; a host read finds {}",
        guest(cell.guest),
        told(cell.told),
        host(cell.host)
    )
}

fn guest(guest: Guest) -> &'static str {
    match guest {
        Guest::Runs => "runs",
        Guest::WaitsForConversion => "waits until the VMM converts",
        Guest::AcceptsAgain => "has to accept again",
        Guest::StuckUntilAccepted => "stuck, unless another vCPU accepts",
        Guest::Stuck => "stuck",
        Guest::Dead => "dead",
    }
}

fn told(told: Told) -> String {
    match told {
        Told::Nobody => "nobody".to_owned(),
        Told::Guest(exception) => format!("guest, {}", raised(exception)),
        Told::Kvm(reason) => format!("KVM, {}", exit(reason)),
        Told::Vmm(refusal) => match status(refusal) {
            Some(status) => format!("VMM, {} ({status})", errno(refusal.cause)),
            None => format!("VMM, {}", errno(refusal.cause)),
        },
        Told::Host(outcome) => format!("host, {}", host(outcome)),
    }
}

fn raised(exception: GuestException) -> &'static str {
    match exception {
        GuestException::NotValidated => "#VC 0x404",
        GuestException::VirtualizationException => "#VE",
        GuestException::ExternalAbort => "synchronous external abort",
        GuestException::CallRefused => "its call fails",
    }
}

fn exit(reason: ExitReason) -> &'static str {
    match reason {
        ExitReason::NotPresent => "stage-2 fault",
        ExitReason::Rmp { .. } => "RMP fault",
        ExitReason::PendingTd => "EPT violation, pending",
        ExitReason::RealmAbort => "REC exit, abort",
        ExitReason::RipasChange => "REC exit, RIPAS change",
        ExitReason::Poisoned => "poisoned page",
    }
}

fn host(outcome: HostOutcome) -> &'static str {
    match outcome {
        HostOutcome::Plain => "plain bytes",
        HostOutcome::Ciphertext => "ciphertext",
        HostOutcome::Corrupted => "the page taken from the guest",
        HostOutcome::Fault => "a fault",
        HostOutcome::MachineCheck => "a machine check",
    }
}

fn errno(cause: Cause) -> &'static str {
    match cause {
        Cause::NotTracked => "ENOENT",
        Cause::Invalid => "EINVAL",
        Cause::Exists => "EEXIST",
        Cause::Busy => "EBUSY",
        Cause::Again => "EAGAIN",
        Cause::NotSupported => "EOPNOTSUPP",
        Cause::NotOwner => "EPERM",
        Cause::NoMemory => "ENOMEM",
        Cause::Poisoned => "EHWPOISON",
        Cause::VmDead => "EIO",
        Cause::Fault => "EFAULT",
        Cause::NoDevice => "ENXIO",
    }
}

fn status(refusal: Refusal) -> Option<String> {
    match refusal.status {
        Status::None => None,
        Status::Rmp(eax) => Some(format!("EAX {eax}")),
        Status::SevFirmware(code) => Some(format!("firmware {code:#x}")),
        Status::Tdx(rax) => Some(format!("RAX {rax:#x}")),
        Status::Rmi(x0) => Some(format!("X0 {x0:#x}")),
        Status::Pkvm(value) => Some(format!("EL2 {value}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_have_every_cell() {
        let text = table(&Architecture::ALL);
        assert_eq!(text.lines().count(), Event::ALL.len() * (1 + Architecture::ALL.len()));
        let row = json_row(Event::Punch, &Architecture::ALL);
        assert_eq!(row["consequences"]["tdx"]["errno"], "EIO");
        assert_eq!(row["consequences"]["snp"]["told"], "guest, #VC 0x404");
        assert_eq!(json_row(Event::Split, &[Architecture::Cca])["consequences"]["cca"], Value::Null);
    }
}
