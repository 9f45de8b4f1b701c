// SPDX-License-Identifier: Apache-2.0

// Package config reads configuration.toml. The structs of this file are the
// single source of the schema: a new key is one new field. Their tags mean
//
//	toml        the key's name
//	default     the built-in value, as it would be written in TOML without quotes
//	doc         what the key does, for docs/configuration.md and the sample file
//	enum        the values a string may have
//	min, max    the range of a number
//	unit        the unit of a time.Duration field; only "s" is known
//	path        "abs": an absolute path or empty; "file": also checked by CheckFiles
//	annotation  the pod annotation's last part, "=" for the key's own name; no
//	            tag means that no annotation can set the key
//	valid       the key that lists the globs an annotation's path must match
//	merge       "append": an annotation is appended to the configured string
//	sep         the separator of a list in an annotation; without it a JSON array
//
// Section and key names are those of Kata Containers where the meaning is the
// same; upstream.go lists the ones that are known and have no effect here.
package config

import (
	"time"
)

// Config is a complete, validated configuration. It is not changed after Load.
type Config struct {
	QEMU    QEMU    `section:"hypervisor.qemu" doc:"The virtual machine monitor and what it boots."`
	Agent   Agent   `section:"agent.kata" doc:"The agent in the guest."`
	Runtime Runtime `section:"runtime" doc:"The shim."`
	Factory Factory `section:"factory" doc:"Pods that start as clones of a saved machine."`

	// path is the main file, empty when the built-in defaults or a body were used.
	path string
	// files are all files read, in order.
	files []string
	// origin maps "section.key" to where it was set, "file:line" or an annotation.
	origin map[string]string
}

// QEMU is [hypervisor.qemu].
type QEMU struct {
	Path         string `toml:"path" default:"/usr/bin/qemu-system-x86_64" path:"file" annotation:"=" valid:"valid_hypervisor_paths" doc:"QEMU, version 7.2 or newer."`
	Kernel       string `toml:"kernel" default:"/usr/share/kata-containers/vmlinux" path:"file" annotation:"=" doc:"Guest kernel: an uncompressed vmlinux (booted through PVH) or a bzImage."`
	Initrd       string `toml:"initrd" default:"/usr/share/kata-containers/kata-initrd.img" path:"file" annotation:"=" doc:"Guest root as an initramfs. Excludes image: a file that sets only image turns the default initrd off."`
	Image        string `toml:"image" default:"" path:"file" annotation:"=" doc:"Guest root as a disk image. Excludes initrd."`
	Manifest     string `toml:"manifest" default:"" path:"abs" doc:"File with the SHA-256 digests that kernel, initrd and image must match. Empty: manifest.json beside the kernel when it exists; without one, nothing is compared."`
	MachineType  string `toml:"machine_type" default:"q35" enum:"q35,microvm" annotation:"=" doc:"QEMU's machine type. microvm boots faster, but takes no devices, CPUs or memory while it runs, and needs the kernel of make kernel."`
	KernelParams string `toml:"kernel_params" default:"" annotation:"=" merge:"append" doc:"Appended to the guest kernel's command line; of two parameters of the same name the later one wins, so these override the built-in ones."`
	Firmware     string `toml:"firmware" default:"" path:"file" annotation:"=" doc:"Firmware image. Empty: qboot where QEMU ships it, else QEMU's default."`
	CPUFeatures  string `toml:"cpu_features" default:"" annotation:"=" doc:"Appended to QEMU's -cpu, for example \"pmu=off,vmx=off\"."`

	DefaultVCPUs            int  `toml:"default_vcpus" default:"1" min:"-1" max:"1024" annotation:"=" doc:"vCPUs at boot, beside those that the pod's limits ask for. 0 means 1, -1 as many as the host has."`
	DefaultMaxVCPUs         int  `toml:"default_maxvcpus" default:"0" min:"0" max:"1024" annotation:"default_max_vcpus" doc:"The most vCPUs a pod can grow to. 0 means as many as the host has."`
	DefaultMemory           int  `toml:"default_memory" default:"256" min:"64" max:"16777216" annotation:"=" doc:"Guest memory at boot, in MiB, beside what the pod's limits ask for."`
	DefaultMaxMemory        int  `toml:"default_maxmemory" default:"0" min:"0" max:"16777216" doc:"The most memory that a guest can grow to, in MiB. 0 means as much as the host has."`
	EnableVirtioMem         bool `toml:"enable_virtio_mem" default:"true" annotation:"=" doc:"Let the guest's memory grow and shrink with its containers (virtio-mem). (Kata Containers' own default is false.)"`
	ReclaimGuestFreedMemory bool `toml:"reclaim_guest_freed_memory" default:"true" annotation:"=" doc:"Give memory that the guest frees back to the host (free page reporting). (Kata Containers' own default is false.)"`

	EnableHugePages   bool `toml:"enable_hugepages" default:"false" annotation:"=" doc:"Take the guest's memory from huge pages of 2 MiB, which the host must have reserved (vm.nr_hugepages), all of it at boot. Memory that the guest frees stays with it. Excludes enable_template."`
	EnableMemPrealloc bool `toml:"enable_mem_prealloc" default:"false" annotation:"=" doc:"Take all of the guest's memory from the host at boot, and what it grows by at once. Memory that the guest frees stays with it. Excludes enable_template."`

	SharedFS          string   `toml:"shared_fs" default:"virtio-fs" enum:"virtio-fs,none" annotation:"=" doc:"How host directories reach the guest. With none, only block devices and files that are copied do."`
	VirtioFSDaemon    string   `toml:"virtio_fs_daemon" default:"" path:"abs" annotation:"=" valid:"valid_virtio_fs_daemon_paths" doc:"The virtio-fs daemon, the Rust one or that of QEMU 7.2. Empty: the first of /usr/libexec/virtiofsd and /usr/lib/qemu/virtiofsd that exists."`
	VirtioFSExtraArgs []string `toml:"virtio_fs_extra_args" default:"[]" annotation:"=" doc:"Appended to the daemon's arguments."`
	VirtioFSCache     string   `toml:"virtio_fs_cache" default:"auto" enum:"never,metadata,auto,always" annotation:"=" doc:"What the guest may cache of shared directories. metadata needs the Rust daemon."`

	VirtioFSInodeFileHandles string `toml:"virtio_fs_inode_file_handles" default:"never" enum:"never,prefer,mandatory" doc:"Whether the daemon refers to files that the guest knows by handles instead of open descriptors. With prefer it does where the host's file system has handles (ext4, xfs, btrfs, tmpfs; not overlayfs), with mandatory all of them must. It needs the Rust daemon and gives it CAP_DAC_READ_SEARCH, with which a daemon that the guest has taken over reads any file of those file systems, not those of the share alone. See docs/volumes.md."`

	VirtioFSWhenNeeded bool `toml:"virtio_fs_when_needed" default:"false" annotation:"=" doc:"Start the daemon only when the first container needs a shared file, also in a pod that begins without containers (Sandbox API). For nodes whose snapshotter gives root filesystems as disks; with others each pod would wait for a device that is plugged in. A pod that begins with a container on disks does so in any case."`

	DisableBlockDeviceUse bool `toml:"disable_block_device_use" default:"false" annotation:"=" doc:"Do not give root filesystems to the guest as disks: they are mounted on the host and reach it through shared_fs. An annotation can do so only with containerd 2.4 and newer."`

	Accelerator string `toml:"accelerator" default:"kvm" enum:"kvm,tcg,auto" doc:"kvm: refuse to start without usable KVM. tcg: emulate in software, many times slower. auto: prove KVM with a micro-guest before each start and fall back to tcg."`
	Vsock       string `toml:"vsock" default:"auto" enum:"auto,vhost,vhost-user" doc:"The channel to the guest. vhost: the host kernel's (/dev/vhost-vsock). vhost-user: a device inside the shim that needs no kernel module. auto: vhost when its device opens."`
	Rootless    bool   `toml:"rootless" default:"true" annotation:"=" doc:"Run the VMM as an unprivileged user of the pod's own."`

	DisableVhostNet      bool `toml:"disable_vhost_net" default:"false" annotation:"=" doc:"Let the VMM itself serve network devices, also on a host that has /dev/vhost-net."`
	NetworkQueues        int  `toml:"network_queues" default:"0" min:"0" max:"16" doc:"Queue pairs of each network device. 0 means as many as vCPUs at boot, at most 16."`
	RxRateLimiterMaxRate int  `toml:"rx_rate_limiter_max_rate" default:"0" min:"0" max:"1000000000000" annotation:"=" doc:"The most that each network device receives, in bits per second. 0 means no limit. Needs internetworking_model = \"tcfilter\"."`
	TxRateLimiterMaxRate int  `toml:"tx_rate_limiter_max_rate" default:"0" min:"0" max:"1000000000000" annotation:"=" doc:"The most that each network device sends, in bits per second. 0 means no limit. Needs internetworking_model = \"tcfilter\"."`

	EnableAnnotations        []string `toml:"enable_annotations" default:"[]" doc:"Which io.katacontainers.config.* pod annotations are allowed: regular expressions that must match the whole of an annotation's last part, for example [\"default_vcpus\", \"default_memory\", \"kernel_params\"]. Empty refuses all."`
	ValidHypervisorPaths     []string `toml:"valid_hypervisor_paths" default:"[]" doc:"Globs, one of which the path annotation must match. Empty refuses that annotation."`
	ValidVirtioFSDaemonPaths []string `toml:"valid_virtio_fs_daemon_paths" default:"[]" doc:"Globs, one of which the virtio_fs_daemon annotation must match. Empty refuses that annotation."`
	GuestHookPath            string   `toml:"guest_hook_path" default:"" path:"abs" annotation:"=" doc:"Directory in the guest image with the folders prestart, poststart and poststop, whose programs are run as hooks of every container. Empty: none."`
	EnableDebug              bool     `toml:"enable_debug" default:"false" doc:"Let the guest kernel log in full to the console, and log QEMU's command line."`
}

// Agent is [agent.kata].
type Agent struct {
	EnableDebug          bool          `toml:"enable_debug" default:"false" doc:"Let the agent log at debug level."`
	DebugConsoleEnabled  bool          `toml:"debug_console_enabled" default:"false" doc:"Serve a root shell of the guest on vsock port 1026. Whoever reaches it owns the guest."`
	DialTimeout          time.Duration `toml:"dial_timeout" default:"45" unit:"s" min:"1" max:"3600" doc:"How long a guest may take to boot until its agent answers, in seconds."`
	KernelModules        []string      `toml:"kernel_modules" default:"[]" annotation:"=" sep:";" doc:"Modules that the agent loads, each followed by its parameters: [\"e1000e EEE=1\", \"i915\"]. The guest image must hold them."`
	ContainerPipeSize    int           `toml:"container_pipe_size" default:"0" min:"0" max:"1048576" annotation:"=" doc:"Size of the pipes of a container's output, in bytes. 0 keeps the agent's own, 256 KiB."`
	LaunchProcessTimeout time.Duration `toml:"launch_process_timeout" default:"6" unit:"s" min:"1" max:"3600" doc:"How long the agent waits for a process to start, in seconds."`
}

// Runtime is [runtime].
type Runtime struct {
	EnableDebug               bool          `toml:"enable_debug" default:"false" doc:"Let the shim log at debug level."`
	InternetworkingModel      string        `toml:"internetworking_model" default:"tcfilter" enum:"tcfilter,macvtap,none" annotation:"=" doc:"How the pod's network devices reach the VM. tcfilter: traffic control redirects between device and tap. macvtap: a macvtap lies on the device. none: not at all."`
	DisableGuestSeccomp       bool          `toml:"disable_guest_seccomp" default:"false" annotation:"=" doc:"Do not apply the container's seccomp profile in the guest. (Kata Containers' own default is true.)"`
	SandboxCgroupOnly         bool          `toml:"sandbox_cgroup_only" default:"true" annotation:"=" doc:"true: VMM, virtio-fs daemon and shim are in the pod's cgroup, whose limits must leave room for them. false: only the vCPUs' threads are, the rest is in /kata_overhead and not limited; needs cgroup version 1 and cgroup paths that are not systemd's."`
	SandboxBindMounts         []string      `toml:"sandbox_bind_mounts" default:"[]" doc:"Host paths that every guest sees, read-only unless followed by \":rw\", for services of the guest."`
	StaticSandboxResourceMgmt bool          `toml:"static_sandbox_resource_mgmt" default:"false" doc:"Give the machine the size of its pod at boot and never change it."`
	DisableNewNetNS           bool          `toml:"disable_new_netns" default:"false" annotation:"=" doc:"Run the VMM in the host's network namespace. Needs internetworking_model = \"none\"."`
	Experimental              []string      `toml:"experimental" default:"[]" doc:"Experimental features to turn on. None exists yet."`
	CreateContainerTimeout    time.Duration `toml:"create_container_timeout" default:"60" unit:"s" min:"1" max:"3600" annotation:"=" doc:"How long the creation of a container may take, in seconds."`
	EnableCheckpoint          bool          `toml:"enable_checkpoint" default:"false" annotation:"=" doc:"Start pods so that they can be saved and restored (docs/checkpoint.md): streams over virtio-serial, no shared filesystem, a size that does not change, no clones."`
	Restore                   string        `toml:"restore" default:"" path:"abs" annotation:"=" doc:"Directory of a checkpoint from which the pod goes on, for use as an annotation; root's, since its content decides what the VMM loads. Empty: it begins anew."`
	StateDir                  string        `toml:"state_dir" default:"/run/kata-containers" path:"abs" doc:"Where every pod's directory and ledger live. A tmpfs of root's."`
}

// Factory is [factory].
type Factory struct {
	EnableTemplate bool   `toml:"enable_template" default:"true" annotation:"=" doc:"Start pods as clones of a machine that was booted once and saved, rather than boot each. The first pod of a configuration boots, and its shim then makes the template; kata-ctl template init makes it beforehand. On a host without room for a template pods boot, and so they do with enable_hugepages, enable_mem_prealloc, enable_checkpoint and microvm. Clones share memory that nobody writes, and start from the same kernel state: see docs/threat-model.md. (Kata Containers' own default is false.)"`
	TemplatePath   string `toml:"template_path" default:"/run/vc/vm/template" path:"abs" doc:"Where templates are kept, some 60 MiB each. A directory of root's, best on a tmpfs."`
}

// CPUs returns the vCPUs at boot and the most a pod can grow to, at least as
// many, on a host with hostCPUs of them.
func (q *QEMU) CPUs(hostCPUs int) (boot, most int) {
	boot, most = q.DefaultVCPUs, q.DefaultMaxVCPUs
	switch {
	case boot < 0:
		boot = hostCPUs
	case boot == 0:
		boot = 1
	}
	if most == 0 {
		most = hostCPUs
	}
	return boot, max(boot, most)
}

// MaxMemoryBytes is the most that a guest's memory can grow to, on a host with that many bytes.
func (q *QEMU) MaxMemoryBytes(host uint64) uint64 {
	if q.DefaultMaxMemory == 0 {
		return host
	}
	return uint64(q.DefaultMaxMemory) << 20
}

// MemoryBytes is DefaultMemory in bytes.
func (q *QEMU) MemoryBytes() uint64 { return uint64(q.DefaultMemory) << 20 }

// Path is the main configuration file, empty when there is none.
func (c *Config) Path() string { return c.path }

// Files are all configuration files that were read, in order.
func (c *Config) Files() []string { return c.files }

// builtIn is the origin of a key that nothing set.
const builtIn = "built-in default"

// Origin says where "section.key" was set: "file:line", "annotation …" or
// "built-in default".
func (c *Config) Origin(key string) string {
	if o, ok := c.origin[key]; ok {
		return o
	}
	return builtIn
}
