// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-v2/kata/integration/lab"
)

// specType is the type of a container's specification (containerd typeurl
// registration of specs.Spec).
const specType = "types.containerd.io/opencontainers/runtime-spec/1/Spec"

// TestVersions: every release line of containerd starts the shim in its own way
// and gets the same container: run, start, exec, exit, kill, delete, the events
// of all that, and a task that outlives the daemon.
func TestVersions(t *testing.T) {
	for _, version := range lab.Versions() {
		t.Run(version, func(t *testing.T) {
			o := labOptions(t)
			o.Version = version
			b := newOwnBox(t, o)
			testLife(b)
			testOptions(b)
			testOutlives(b)
			if version >= "2" {
				testFeatures(b)
			}
		})
	}
}

// testLife: a container from its start to its end.
func testLife(b *box) {
	events := b.subscribe()
	r := b.run("run", nil, "sh", "-c", "cat /proc/sys/kernel/random/boot_id; echo err >&2; exit 7")
	if r.Code != 7 || len(r.Stdout) != 37 || r.Stderr != "err\n" {
		b.Errorf("run: %+v; want status 7, a boot id, err", r)
	}
	events.want("run", "/tasks/create", "/tasks/start", "/tasks/exit init 7", "/tasks/delete")

	b.start("life", nil, "sleep", "1000")
	if got := b.bootID("life"); got == strings.TrimSpace(r.Stdout) {
		b.Errorf("two containers run in one boot, %s", got)
	}
	b.want(b.ctrWith(strings.NewReader("in\n"), b.execArgs("life", nil, []string{"sh", "-c", "cat; exit 5"})...), 5, "in\n")
	if got := stateOf(b.ok("tasks", "ls"), "life"); got != "RUNNING" {
		b.Errorf("state %q, want RUNNING", got)
	}
	if r := b.ctr("tasks", "rm", "life"); r.Code == 0 {
		b.Error("a running task was removed")
	}
	b.ok("tasks", "kill", "--signal", "KILL", "life")
	if got := b.waitTask("life"); got != 137 {
		b.Errorf("status %d, want 137", got)
	}
	if r := b.ctr("tasks", "rm", "life"); !strings.Contains(r.Stderr, "exit code 137") {
		b.Errorf("tasks rm: %+v; want its status 137", r)
	}
	events.want("life", "/tasks/create", "/tasks/start",
		"/tasks/exec-added", "/tasks/exec-started", "/tasks/exit exec 0",
		"/tasks/exec-added", "/tasks/exec-started", "/tasks/exit exec 5",
		"/tasks/exit init 137", "/tasks/delete")
	b.remove("life")
}

// createWith makes and starts a container with runtime options, as containerd's
// CRI plugin does and ctr cannot for this runtime.
func (b *box) createWith(id string, s *spec, options proto.Message) error {
	b.Helper()
	b.Cleanup(func() { b.remove(id) })
	data, err := json.Marshal(s)
	if err != nil {
		b.Fatal(err)
	}
	ctx, conn := calls(b.T), b.connect()
	if _, err := containersapi.NewContainersClient(conn).Create(ctx, &containersapi.CreateContainerRequest{Container: &containersapi.Container{
		ID: id, Spec: &anypb.Any{TypeUrl: specType, Value: data},
		Runtime: &containersapi.Container_Runtime{
			Name:    runtimeName,
			Options: &anypb.Any{TypeUrl: string(options.ProtoReflect().Descriptor().FullName()), Value: marshal(b.T, options)},
		},
	}}); err != nil {
		b.Fatal(err)
	}
	tasks := tasksapi.NewTasksClient(conn)
	if _, err := tasks.Create(ctx, &tasksapi.CreateTaskRequest{ContainerID: id}); err != nil {
		return err
	}
	_, err = tasks.Start(ctx, &tasksapi.StartRequest{ContainerID: id})
	return err
}

// testOptions: runtime options in the form of each kind, through containerd.
func testOptions(b *box) {
	body := &runtimeoptions.Options{ConfigBody: []byte("[hypervisor.qemu]\nkernal = 1\n")}
	if err := b.createWith("body", newSpec(b.T, "true"), body); err == nil || !strings.Contains(err.Error(), "config_body") || !strings.Contains(err.Error(), "kernal") {
		b.Errorf("a wrong config_body: %v", err)
	}
	gone := &runtimeoptions.Options{ConfigPath: "/no/such/kata.toml", ConfigBody: body.ConfigBody}
	if err := b.createWith("path", newSpec(b.T, "true"), gone); err == nil || !strings.Contains(err.Error(), gone.ConfigPath) {
		b.Errorf("a missing configuration file: %v", err)
	}
}

// testOutlives: the daemon is killed and started again; it finds its task, which
// was started with options of runc.
func testOutlives(b *box) {
	if err := b.createWith("outlives", newSpec(b.T, "sleep", "1000"), &runcoptions.Options{ShimCgroup: "/c", BinaryName: "/no/such/runc", SystemdCgroup: true}); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	if _, err := b.c.WaitLog(ctx, func(l string) bool {
		return strings.Contains(l, "sandbox=outlives") && strings.Contains(l, "without effect here: binary_name, shim_cgroup")
	}); err != nil {
		b.Error(err)
	}
	boot := b.bootID("outlives")
	if err := b.c.Kill(); err != nil {
		b.Fatal(err)
	}
	if err := b.c.Restart(ctx); err != nil {
		b.Fatal(err)
	}
	if got := b.bootID("outlives"); got != boot {
		b.Errorf("after the restart the container runs in boot %s, before in %s", got, boot)
	}
	b.remove("outlives")
}

// testFeatures: what containerd 2 and its CRI plugin learn about the runtime.
func testFeatures(b *box) {
	out := b.ok("plugins", "inspect-runtime", "--runtime", runtimeName)
	if !strings.Contains(out, `"rro"`) || strings.Contains(out, `"user"`) || !strings.Contains(out, `runtime-allow-mounts": "erofs`) {
		b.Errorf("the runtime's description: %s", out)
	}
}
