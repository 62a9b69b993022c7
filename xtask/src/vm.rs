//! Runs a command of this machine under a real kernel with a real KVM, in QEMU's software emulation.
//!
//! The emulated processor has SVM with nested paging, so kvm-amd works in the guest, and nothing of the machine that this runs on
//! is asked for: no /dev/kvm, no root. The command sees this machine's files read-only, at their own paths.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;

use crate::kernels::{self, Image, Kernel};
use crate::sys::{self, Missing, Tool};

/// Run a command of this machine under a real kernel with a real KVM, in software emulation.
///
/// The command sees this machine's files read-only; /run, /dev/shm and $TMPDIR are the guest's own and writable, and so is each
/// --write folder, whose changes are this machine's. Its output appears as it is written: standard output as standard output,
/// byte for byte; standard error and the kernel's console as standard error. The command's exit status is passed on; 124 means
/// that the time ran out, 125 that the VM failed, 77 that something is missing. If the guest's kernel panics before the command
/// has ended, the VM is started a second time, which a message says.
///
/// Kernels are downloaded from Debian, or built, once. Several VMs may run at the same time.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask vm stock -- uname -r\n  \
    cargo xtask vm -t 60 ref -- sh -c 'ls -l /dev/kvm; cat /proc/cpuinfo'\n  \
    cargo xtask vm --write target --append transparent_hugepage=always 7.3 -- sh -c 'dmesg > target/dmesg'")]
pub(crate) struct Args {
    /// End the VM after so many seconds
    #[arg(short, long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    #[command(flatten)]
    machine: Machine,
    /// A folder of this machine that the command may write
    #[arg(long, value_name = "FOLDER")]
    write: Vec<PathBuf>,
    /// The user that runs the command; root without
    #[arg(long, value_name = "UID")]
    user: Option<u32>,
    /// The kernel
    #[arg(value_enum)]
    kernel: Kernel,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// The emulated machine.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Machine {
    /// RAM, in QEMU's notation; this machine gives it only as it is used
    #[arg(long, value_name = "SIZE", default_value = "6G")]
    pub(crate) memory: String,
    /// Processors; what needs no more than one has one, everything else two
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u8>,
    /// How the processors run; `turns`, where a command does not need another way
    #[arg(long, value_enum)]
    pub(crate) mode: Option<Mode>,
    /// Huge pages of 2 MiB that are set aside at boot
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) hugepages: u32,
    /// Arguments for the kernel; may be given more than once
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    pub(crate) append: Vec<String>,
    /// A kernel image that is used as `ref` instead of building one
    #[arg(long, value_name = "FILE", env = "GMEM_REF_KERNEL")]
    pub(crate) ref_image: Option<PathBuf>,
}

/// How the emulated processors run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// One after the other on one processor of this machine. Slower than `parallel` where several are busy, and reliable.
    Turns,
    /// Each on a thread of its own. The emulator then loses an access now and then that meets a change of nested paging:
    /// guests of KVM end with KVM_EXIT_SHUTDOWN, or hang, once in 20 to 40 runs of a test with four busy vCPUs, natively too.
    Parallel,
    /// In turns, and an instruction takes a nanosecond: times do not depend on this machine, and are the same in every run.
    Counted,
}

impl Mode {
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Turns => &["-accel", "tcg,thread=single"],
            Self::Parallel => &["-accel", "tcg,thread=multi"],
            // Without sleep=off, for which waiting takes no time, a guest that waits for files would be ahead of them.
            Self::Counted => &["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=on"],
        }
    }
}

/// Processors where nothing else is said.
pub(crate) const CPUS: u8 = 2;

impl Machine {
    /// The same machine with so many processors, unless their number was given.
    pub(crate) fn with_cpus(&self, cpus: u8) -> Self {
        Self { cpus: Some(self.cpus.unwrap_or(cpus)), ..self.clone() }
    }

    /// The same machine in this mode, unless one was given.
    pub(crate) fn in_mode(&self, mode: Mode) -> Self {
        Self { mode: Some(self.mode.unwrap_or(mode)), ..self.clone() }
    }
}

/// One boot: a kernel, a machine, and a command in it.
#[derive(Debug)]
pub(crate) struct Boot<'a> {
    pub(crate) kernel: Kernel,
    pub(crate) machine: &'a Machine,
    pub(crate) timeout: Duration,
    pub(crate) write: &'a [PathBuf],
    pub(crate) user: Option<u32>,
    pub(crate) command: &'a [OsString],
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let boot = Boot {
        kernel: args.kernel,
        machine: &args.machine,
        timeout: Duration::from_secs(args.timeout),
        write: &args.write,
        user: args.user,
        command: &args.command,
    };
    Ok(ExitCode::from(boot.run()?))
}

/// What booting takes.
const TOOLS: [Tool; 4] = [
    Tool("qemu-system-x86_64", "qemu-system-x86"),
    Tool("busybox", "busybox-static"),
    Tool("cpio", "cpio"),
    Tool("setpriv", "util-linux"),
];

/// The exit status for a time that ran out, as timeout(1) has it.
pub(crate) const EXIT_TIMEOUT: u8 = 124;

impl Boot<'_> {
    /// Boots, runs the command, and returns its exit status.
    pub(crate) fn run(&self) -> Result<u8> {
        sys::need(&TOOLS)?;
        let image = kernels::obtain(self.kernel, self.machine.ref_image.as_deref())?;
        let folder = tempfile::Builder::new().prefix("gmem-vm-").tempdir().context("creating the VM's folder")?;
        let shares = self.shares(folder.path())?;
        fs::write(folder.path().join("command"), self.script()?.as_bytes())?;
        initrd(&image, &shares, folder.path())?;
        let mut ended = self.watch(self.qemu(&image, &shares, folder.path()))?;
        if ended.panicked() && !folder.path().join("status").exists() {
            eprintln!("xtask: the guest's kernel panicked; once more from the beginning");
            ended = self.watch(self.qemu(&image, &shares, folder.path()))?;
        }
        self.status(&ended, folder.path())
    }

    /// The folders that the guest may write: "run" for the VM itself, the others at their own paths.
    fn shares(&self, folder: &Path) -> Result<Vec<Share>> {
        let own = Share { tag: "run".to_owned(), host: folder.to_path_buf(), guest: "/run/gmem".into() };
        let mut shares = vec![own];
        for (number, path) in self.write.iter().enumerate() {
            let path = fs::canonicalize(path).with_context(|| format!("the folder {}", path.display()))?;
            shares.push(Share { tag: format!("write{number}"), host: path.clone(), guest: path });
        }
        Ok(shares)
    }

    /// What the guest's shell runs: the command, in this folder, with the few variables that still make sense.
    fn script(&self) -> Result<OsString> {
        let mut script = OsString::from("cd ");
        script.push(sys::quote(env::current_dir()?.as_os_str()));
        script.push(" || exit 125\nexport HOME=/run TMPDIR=/run/tmp LC_ALL=C.UTF-8 TERM=dumb");
        for name in ["PATH", "RUST_BACKTRACE", "RUST_LOG"] {
            if let Some(value) = env::var_os(name) {
                script.push(format!(" {name}="));
                script.push(sys::quote(&value));
            }
        }
        script.push("\nexec");
        if let Some(user) = self.user {
            script.push(format!(" setpriv --reuid={user} --regid={user} --clear-groups --"));
        }
        for word in self.command {
            script.push(" ");
            script.push(sys::quote(word));
        }
        script.push("\n");
        Ok(script)
    }

    fn qemu(&self, image: &Image, shares: &[Share], folder: &Path) -> Command {
        // setpriv: QEMU must not outlive this process, however this process ends.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64", "-nodefaults", "-no-reboot", "-display", "none"]);
        qemu.args(["-machine", "q35", "-cpu", "max,+svm"]).args(self.machine.mode.unwrap_or(Mode::Turns).arguments());
        qemu.args(["-smp", &self.machine.cpus.unwrap_or(CPUS).to_string(), "-m", &self.machine.memory]);
        qemu.arg("-kernel").arg(&image.vmlinuz).arg("-initrd").arg(folder.join("initrd"));
        qemu.arg("-append").arg(self.arguments());
        // The console first, then the command's output; QEMU's own two are pipes to this process.
        qemu.args(["-chardev", "file,id=console,path=/dev/stderr", "-serial", "chardev:console"]);
        qemu.args(["-chardev", "file,id=output,path=/dev/stdout", "-serial", "chardev:output"]);
        let p9 = |path: &Path, tag: &str, more: &str| {
            let path = path.display().to_string().replace(',', ",,");
            format!("local,path={path},mount_tag={tag},security_model=none,multidevs=remap{more}")
        };
        qemu.args(["-virtfs", &p9(Path::new("/"), "host", ",readonly=on")]);
        for share in shares {
            qemu.args(["-virtfs", &p9(&share.host, &share.tag, "")]);
        }
        qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        qemu
    }

    fn arguments(&self) -> String {
        // oops=panic: a kernel that lost a task may hang instead of ending.
        // no_timer_check: on a busy machine the emulated timer may be too late for the kernel's test of it.
        let mut arguments = "console=ttyS0 panic=-1 oops=panic quiet no_timer_check".to_owned();
        if self.machine.hugepages > 0 {
            arguments.push_str(&format!(" hugepagesz=2M hugepages={}", self.machine.hugepages));
        }
        for more in &self.machine.append {
            arguments.push(' ');
            arguments.push_str(more);
        }
        arguments
    }

    /// Passes the output on until QEMU ends, the time runs out, or a signal asks to stop.
    fn watch(&self, mut qemu: Command) -> Result<Ended> {
        let stop = stop_flag()?;
        let mut child = qemu.spawn().context("starting QEMU")?;
        let output = forward(child.stdout.take(), std::io::stdout());
        let console = forward(child.stderr.take(), std::io::stderr());
        let ended = wait(&mut child, Instant::now() + self.timeout, &stop);
        // A reader of ours that went away (a closed pipe) is no reason to fail.
        let _ = output.join();
        let panicked = console.join().unwrap_or(false);
        Ok(match ended? {
            Ended::ByItself { .. } => Ended::ByItself { panicked },
            other => other,
        })
    }

    fn status(&self, ended: &Ended, folder: &Path) -> Result<u8> {
        match ended {
            Ended::TimeOut => {
                eprintln!("xtask: the VM did not end within {} s (-t SECONDS)", self.timeout.as_secs());
                return Ok(EXIT_TIMEOUT);
            }
            Ended::Stopped => return Ok(130),
            Ended::ByItself { .. } => {}
        }
        let status = fs::read_to_string(folder.join("status")).unwrap_or_default();
        status
            .trim()
            .parse()
            .map_err(|_| anyhow!("the VM ended before the command did: see the console's messages above"))
    }
}

#[derive(Debug)]
struct Share {
    tag: String,
    host: PathBuf,
    guest: PathBuf,
}

#[derive(Clone, Copy, Debug)]
enum Ended {
    ByItself { panicked: bool },
    TimeOut,
    Stopped,
}

impl Ended {
    fn panicked(self) -> bool {
        matches!(self, Self::ByItself { panicked: true })
    }
}

/// Set by the signals that ask a program to end, so that the VM's folder is removed and QEMU is gone when this process is.
fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

fn wait(child: &mut Child, deadline: Instant, stop: &AtomicBool) -> Result<Ended> {
    let ended = loop {
        if child.try_wait()?.is_some() {
            // An interrupt from the terminal reaches QEMU as well, which then ends by itself.
            return Ok(if stop.load(Ordering::Relaxed) { Ended::Stopped } else { Ended::ByItself { panicked: false } });
        } else if stop.load(Ordering::Relaxed) {
            break Ended::Stopped;
        } else if Instant::now() > deadline {
            break Ended::TimeOut;
        }
        thread::sleep(Duration::from_millis(20));
    };
    child.kill()?;
    child.wait()?;
    Ok(ended)
}

/// What a kernel prints as it ends.
const PANIC: &[u8] = b"Kernel panic - not syncing";

/// Copies a stream as it arrives; whether a kernel panicked in it.
fn forward(from: Option<impl Read + Send + 'static>, mut to: impl Write + Send + 'static) -> thread::JoinHandle<bool> {
    thread::spawn(move || {
        let Some(mut from) = from else { return false };
        let (mut buffer, mut seen, mut panicked) = ([0; 4096], Vec::new(), false);
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            // The stream is read to its end in any case: QEMU must not block on a full pipe.
            let _ = to.write_all(&buffer[..length]).and_then(|()| to.flush());
            seen.extend_from_slice(&buffer[..length]);
            panicked |= seen.windows(PANIC.len()).any(|window| window == PANIC);
            // The words may come in two pieces.
            seen.drain(..seen.len().saturating_sub(PANIC.len()));
        }
        panicked
    })
}

/// The guest's first file system: busybox, the modules, and `init.sh`.
fn initrd(image: &Image, shares: &[Share], folder: &Path) -> Result<()> {
    let root = folder.join("root");
    for name in ["bin", "lib", "proc", "sys", "dev", "mnt"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy(static_busybox()?, root.join("bin/busybox"))?;
    for module in &image.modules {
        fs::copy(module, root.join("lib").join(module.file_name().unwrap_or_default()))?;
    }
    let lines: Vec<String> = shares.iter().map(|share| format!("{} {}\n", share.tag, share.guest.display())).collect();
    fs::write(root.join("shares"), lines.concat())?;
    let me = env::current_exe().context("the path of xtask")?;
    fs::write(root.join("xtask"), [me.as_os_str().as_bytes(), b"\n"].concat())?;
    fs::write(root.join("init"), include_str!("init.sh"))?;
    sys::run(Command::new("chmod").arg("755").arg(root.join("init")))?;
    let pack = "find . | cpio --quiet -o -H newc > ../initrd";
    sys::run(Command::new("sh").args(["-c", pack]).current_dir(&root))?;
    Ok(fs::remove_dir_all(root)?)
}

/// A busybox that runs without a C library: there is none in the first file system.
fn static_busybox() -> Result<PathBuf> {
    let missing = || Missing("a static busybox (apt-get install busybox-static)".to_owned());
    let path = sys::which("busybox").ok_or_else(missing)?;
    let mut head = [0; 1024];
    let length = fs::File::open(&path)?.read(&mut head)?;
    // A dynamic program names its loader in the first page.
    if head[..length].windows(7).any(|window| window == b"/ld-lin" || window == b"ld-musl") {
        bail!(missing());
    }
    Ok(path)
}
