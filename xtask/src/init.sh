#!/bin/busybox sh
# The first process of a guest: loads KVM, mounts the host's files, runs the command in them, hands out its status.
# /shares lists folders that the guest may write, one "TAG PATH" per line; the tag "run" is for this script itself.
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in /lib/*.ko; do
    [ -e "$module" ] && insmod "$module"
done

p9=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o $p9,cache=loose,ro host /mnt || echo "gmem: the host's files cannot be mounted"
mount -t proc none /mnt/proc
mount -t sysfs none /mnt/sys
mount -t debugfs none /mnt/sys/kernel/debug
mount -t devtmpfs none /mnt/dev
mkdir -p /mnt/dev/shm /mnt/dev/pts
mount -t tmpfs none /mnt/dev/shm
mount -t devpts none /mnt/dev/pts 2>/dev/null
mount -t tmpfs none /mnt/run
mount -t tmpfs none /mnt/var/tmp
mkdir -p /mnt/run/gmem /mnt/run/tmp
chmod 1777 /mnt/dev/shm /mnt/var/tmp /mnt/run/tmp
chmod 666 /dev/kvm
ip link set lo up 2>/dev/null

# No cache: what the guest writes is with the host at once, even if the guest then dies.
while read -r tag path; do
    mkdir -p "/mnt$path"
    mount -t 9p -o $p9,cache=none "$tag" "/mnt$path" || echo "gmem: $path cannot be mounted"
done < /shares

# The command's standard output has a serial line of its own, byte for byte; everything else goes to the console.
stty -F /dev/ttyS1 raw -echo
read -r xtask < /xtask
chroot /mnt "$xtask" hold-vm -- /bin/sh /run/gmem/command </dev/null >/dev/ttyS1 2>/dev/console
echo $? > /mnt/run/gmem/status
sync
poweroff -f
