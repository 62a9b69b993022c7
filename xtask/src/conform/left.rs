//! What clients may leave behind on a machine.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Everything that outlives a client that does not clean up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// Processes that have a program; the kernel's own threads have none.
    processes: BTreeSet<String>,
    /// Files in the folders for temporary ones.
    files: BTreeSet<String>,
    /// Memfds of all processes, as `PID NAME`.
    memfds: BTreeSet<String>,
    /// VMs, as KVM's debugfs lists them; empty where that is not mounted.
    vms: BTreeSet<String>,
    free_hugepages: u64,
    /// Memory of memfds and of tmpfs.
    shmem_kib: u64,
}

/// The counter of shared memory is gathered from those of the processors: it is not exact at any moment.
const SLACK_KIB: u64 = 1024;

/// How long the kernel may take to bury a process that was killed.
const BURIAL: Duration = Duration::from_secs(20);

impl Held {
    pub(super) fn now() -> Result<Self> {
        let mut held = Self {
            processes: BTreeSet::new(),
            files: BTreeSet::new(),
            memfds: BTreeSet::new(),
            vms: names(Path::new("/sys/kernel/debug/kvm")).into_iter().filter(|name| name.contains('-')).collect(),
            free_hugepages: meminfo("HugePages_Free:")?,
            shmem_kib: meminfo("Shmem:")?,
        };
        for folder in ["/dev/shm", "/run/tmp", "/var/tmp"] {
            held.files.extend(names(Path::new(folder)).into_iter().map(|name| format!("{folder}/{name}")));
        }
        for pid in names(Path::new("/proc")).into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
            held.add_process(&pid);
        }
        Ok(held)
    }

    /// A process may end while it is looked at; then it counts as far as it was seen.
    fn add_process(&mut self, pid: &str) {
        let folder = Path::new("/proc").join(pid);
        let Ok(program) = fs::read_link(folder.join("exe")) else { return };
        self.processes.insert(format!("{pid} {}", program.display()));
        for fd in names(&folder.join("fd")) {
            if let Ok(target) = fs::read_link(folder.join("fd").join(fd))
                && target.starts_with("/memfd:")
            {
                self.memfds.insert(format!("{pid} {}", target.display()));
            }
        }
    }

    /// Waits until no more is held than this; after a time what is too much is an error.
    pub(super) fn regained(&self) -> Result<()> {
        let deadline = Instant::now() + BURIAL;
        loop {
            let more = self.more(&Self::now()?);
            if more.is_empty() {
                return Ok(());
            } else if Instant::now() > deadline {
                bail!("left behind: {}", more.join(", "));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// What `after` has and this has not.
    fn more(&self, after: &Self) -> Vec<String> {
        let mut more = Vec::new();
        let sets = [
            ("process", &self.processes, &after.processes),
            ("file", &self.files, &after.files),
            ("memfd", &self.memfds, &after.memfds),
            ("VM", &self.vms, &after.vms),
        ];
        for (kind, before, after) in sets {
            more.extend(after.difference(before).map(|name| format!("{kind} {name}")));
        }
        if after.free_hugepages < self.free_hugepages {
            more.push(format!("{} huge pages", self.free_hugepages - after.free_hugepages));
        }
        if after.shmem_kib > self.shmem_kib + SLACK_KIB {
            more.push(format!("{} KiB of shared memory", after.shmem_kib - self.shmem_kib));
        }
        more
    }
}

/// The names in a folder; none where it does not exist.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn meminfo(field: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("no {field}"))?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_that_stays_is_seen_until_it_ends() {
        let before = Held::now().unwrap();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().to_string();
        let found = |held: &Held| held.processes.iter().any(|line| line.split(' ').next() == Some(&pid));
        assert!(found(&Held::now().unwrap()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!found(&Held::now().unwrap()));
        let more = Held { free_hugepages: 0, shmem_kib: before.shmem_kib + 2 * SLACK_KIB, ..before.clone() };
        let fewer = Held { free_hugepages: 3, ..before };
        assert_eq!(fewer.more(&more), ["3 huge pages", "2048 KiB of shared memory"]);
    }
}
