// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/guest-agent/agentlog"
	"github.com/kata-v2/kata/guest-agent/engine"
	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/guest-agent/ocispec"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// State is where a container is in its life; see the package's drawing.
type State int

// The states of a container.
const (
	Created State = iota
	Running
	Paused
	Stopped
)

var stateNames = [...]string{"created", "running", "paused", "stopped"}

// String is the state's name in the drawing.
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return "state " + strconv.Itoa(int(s))
}

// Container is one container of the pod.
type Container struct {
	ID string

	pod       *Pod
	bundle    string
	group     Group
	storages  []string // mount points, in the order they were made
	share     shareUse
	numbers   numbers
	sharedPID bool // its processes do not end with its first one by themselves
	poststart bool
	poststop  bool
	watchers  sync.WaitGroup // of processes and of the OOM counter
	launches  sync.WaitGroup // Exec calls under way
	removeMu  sync.Mutex     // only tried, never waited for: one RemoveContainer works at a time

	// open ends when removal begins, life when its processes are gone; life
	// frees what still waits for output, bounded by drain.
	open, life context.Context
	shut, end  context.CancelFunc

	mu    sync.Mutex
	state State                              // guarded by mu
	begun bool                               // guarded by mu; Start was called
	init  *Process                           // set before the container is published
	execs map[string]*Process                // guarded by mu; nil value: being launched
	give  map[string]context.CancelCauseFunc // guarded by mu; gives up the launch of an exec
	nexec int                                // guarded by mu; makes file names
	drain context.Context                    // guarded by mu; set before life ends
}

// Init is the container's first process.
func (c *Container) Init() *Process { return c.init }

func (c *Container) drainContext() context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.drain == nil {
		return context.Background()
	}
	return c.drain
}

// processGone is called once for each process, before its waiters are told.
func (c *Container) processGone(pr *Process) {
	if pr != c.init {
		return
	}
	c.mu.Lock()
	c.state = Stopped
	c.mu.Unlock()
	if !c.sharedPID {
		return // the kernel ends a PID namespace with its first process
	}
	if err := c.group.Kill(); err != nil {
		c.pod.cfg.Log.Warn("processes of an ended container", agentlog.KeyContainer, c.ID, agentlog.KeyError, err.Error())
	}
}

// Process finds a process: the init when execID is empty or the container's id.
func (c *Container) Process(execID string) (*Process, error) {
	if execID == "" || execID == c.ID {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if pr := c.execs[execID]; pr != nil {
		return pr, nil
	}
	return nil, fault.New(fault.NotFound, "container %s has no process %q", c.ID, execID)
}

// expect refuses when the container is in none of the wanted states.
func (c *Container) expect(want ...State) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, w := range want {
		if c.state == w {
			return nil
		}
	}
	return fault.New(fault.FailedPrecondition, "container %s is %v: want %v", c.ID, c.state, want)
}

// become sets the state unless the container has stopped meanwhile.
func (c *Container) become(s State) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != Stopped {
		c.state = s
	}
}

// Start lets the init run its program.
func (c *Container) Start(ctx context.Context) error {
	if err := c.expect(Created); err != nil {
		return c.endedEarly(err)
	}
	// Before the program runs: it may end before Start returns.
	c.mu.Lock()
	c.begun = true
	c.mu.Unlock()
	c.become(Running)
	if err := c.pod.cfg.Engine.Start(ctx, c.ID, c.poststart); err != nil {
		c.mu.Lock()
		c.begun = false
		if c.state == Running {
			c.state = Created
		}
		c.mu.Unlock()
		return err
	}
	return nil
}

// endedEarly says how a container ended that was never started, else it is err.
func (c *Container) endedEarly(err error) error {
	c.mu.Lock()
	begun := c.begun
	c.mu.Unlock()
	if begun || !c.init.exited() {
		return err
	}
	why := ""
	if st := c.init.status; st.Signaled && st.Code == 128+int(unix.SIGKILL) {
		why = ", which is also what becomes of it when its memory limit is too low for a start"
	}
	return fault.New(fault.FailedPrecondition, "container %s ended with status %d before it was started%s", c.ID, c.init.status.Code, why)
}

// Exec runs one more process, under the name execID.
func (c *Container) Exec(ctx context.Context, execID string, p *agentpb.Process, ports Ports) (*Process, error) {
	if execID == "" || execID == c.ID {
		return nil, fault.New(fault.InvalidArgument, "exec_id %q: want one that is not the container's", execID)
	}
	spec, err := ocispec.Process(p)
	if err != nil {
		return nil, err
	}
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	name, err := c.reserve(execID, giveUp)
	if err != nil {
		return nil, err
	}
	defer c.launches.Done()
	stop := context.AfterFunc(c.open, func() { giveUp(nil) }) // removal does not wait for a slow launch
	defer stop()
	pr, err := c.execAs(ctx, execID, name, spec, ports)
	if err != nil {
		c.mu.Lock()
		delete(c.execs, execID)
		delete(c.give, execID)
		c.mu.Unlock()
		return nil, err
	}
	if errors.Is(context.Cause(ctx), errLaunchKilled) { // it was launched all the same
		_ = pr.eng.Signal(unix.SIGKILL)
	}
	return pr, nil
}

// errLaunchKilled is why a launch is given up that its caller does not want any more.
var errLaunchKilled = fault.New(fault.FailedPrecondition, "killed before it ran")

func (c *Container) execAs(ctx context.Context, execID, name string, spec *specs.Process, ports Ports) (made *Process, err error) {
	set, err := c.pod.openStreams(ctx, ports, spec.Terminal)
	if err != nil {
		return nil, err
	}
	addHome(spec, fmt.Sprintf("/proc/%d/root", c.init.PID()), "/etc/passwd")
	ep, err := c.launch(ctx, engine.Exec{ID: c.ID, Bundle: c.bundle, Name: name, Spec: spec, Stdio: set.Child()})
	if err != nil {
		set.Abort()
		return nil, err
	}
	c.adopt(execID, ep, set, func(pr *Process) {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.give, execID)
		c.execs[execID], made = pr, pr
	})
	return made, nil
}

// reserve takes the name execID in a live container, and a place among the
// launches, so that removal waits for this call. It answers a file name.
func (c *Container) reserve(execID string, giveUp context.CancelCauseFunc) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != Created && c.state != Running {
		return "", fault.New(fault.FailedPrecondition, "container %s is %v: exec wants it created or running", c.ID, c.state)
	}
	if _, taken := c.execs[execID]; taken {
		return "", fault.New(fault.AlreadyExists, "container %s has a process %q already", c.ID, execID)
	}
	c.execs[execID] = nil
	if c.give == nil {
		c.give = map[string]context.CancelCauseFunc{}
	}
	c.give[execID] = giveUp
	c.nexec++
	c.launches.Add(1)
	return "exec" + strconv.Itoa(c.nexec), nil
}

// launch runs the engine inside the container's cgroup. A workload that manages
// cgroups itself may have made the group one that only groups below it hold
// processes (cgroup-v2.rst, "no internal process"): then next to its init.
func (c *Container) launch(ctx context.Context, e engine.Exec) (*engine.Process, error) {
	dir, err := c.group.Open()
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	ctx, cancel := c.pod.launchContext(ctx)
	defer cancel()
	e.Cgroup = dir
	ep, err := c.pod.cfg.Engine.Exec(ctx, e)
	if !errors.Is(err, unix.EBUSY) {
		return ep, err
	}
	below, err := cgroupOf(c.init.PID())
	if err != nil {
		return nil, fmt.Errorf("exec: cgroup of the container's init: %w", err)
	}
	dir2, err := os.OpenFile(below, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer dir2.Close()
	e.Cgroup = dir2
	return c.pod.cfg.Engine.Exec(ctx, e)
}

// giveUp ends the launch of an exec that does not run yet.
func (c *Container) giveUp(execID string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	giveUp, launching := c.give[execID]
	if launching {
		giveUp(errLaunchKilled)
	}
	return launching
}

// Signal sends sig to one process, or with no execID to all of the container. An exec
// that is being launched takes no other signal than KILL.
func (c *Container) Signal(execID string, sig unix.Signal) error {
	if execID == "" {
		return c.signalAll(sig)
	}
	if sig == unix.SIGKILL && c.giveUp(execID) {
		return nil
	}
	pr, err := c.Process(execID)
	if err != nil {
		return err
	}
	if pr.exited() {
		return fault.New(fault.NotFound, "process %q of container %s has finished", execID, c.ID)
	}
	return pr.eng.Signal(sig)
}

// signalPasses bounds how often signalAll looks again: a program that forks without end
// is ended by KILL alone.
const signalPasses = 8

func (c *Container) signalAll(sig unix.Signal) error {
	if c.init.exited() {
		if pids, err := c.group.Procs(); err == nil && len(pids) == 0 {
			return fault.New(fault.NotFound, "container %s has finished", c.ID)
		}
	}
	if sig == unix.SIGKILL {
		return c.group.Kill()
	}
	// Again, for what was forked meanwhile. Not frozen: a process that the kernel cannot
	// stop would keep the others from the signal, and Pause may come beside it.
	reached := map[int]bool{}
	for range signalPasses {
		pids, err := c.group.Procs()
		if err != nil {
			return err
		}
		all := len(reached)
		for _, pid := range pids {
			if reached[pid] {
				continue
			}
			reached[pid] = true
			if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("signal %d to process %d: %w", sig, pid, err)
			}
		}
		if len(reached) == all {
			break
		}
	}
	return nil
}

// Wait returns the status of a process once it is gone: the exit code, or 128
// plus the number of the signal; and what was written to its stdout and stderr until
// then, see streams.Set.Written.
func (c *Container) Wait(ctx context.Context, execID string) (code int, written [2]uint64, err error) {
	pr, err := c.Process(execID)
	if err != nil {
		return 0, written, err
	}
	st, err := c.wait(ctx, pr)
	return st.Code, pr.IO.Written(), err
}

// Pause stops every process of the container; Resume lets them go on.
func (c *Container) Pause(ctx context.Context) error {
	if err := c.expect(Running); err != nil {
		return err
	}
	if err := c.group.Freeze(ctx, true); err != nil {
		return errors.Join(err, c.group.Freeze(context.WithoutCancel(ctx), false))
	}
	c.become(Paused)
	return nil
}

// Resume is the opposite of Pause.
func (c *Container) Resume(ctx context.Context) error {
	if err := c.expect(Paused); err != nil {
		return err
	}
	if err := c.group.Freeze(ctx, false); err != nil {
		return err
	}
	c.become(Running)
	return nil
}

// Update changes the limits.
func (c *Container) Update(r *agentpb.LinuxResources) error {
	res := ocispec.Resources(r)
	if res == nil {
		return fault.New(fault.InvalidArgument, "resources are missing")
	}
	c.numbers.limits(res)
	if err := c.group.Apply(res); err != nil {
		return err
	}
	return c.group.SetDevices(res.Devices)
}

// Stats reads the counters of the container's cgroup.
func (c *Container) Stats() (*agentpb.CgroupStats, error) { return c.group.Stats() }
