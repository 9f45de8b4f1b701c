// SPDX-License-Identifier: Apache-2.0

package soak

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	internalapi "k8s.io/cri-api/pkg/apis"
	criclient "k8s.io/cri-client/pkg"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/integration/lab"
	"github.com/kata-v2/kata/integration/lab/leak"
)

// callLimit bounds one call, of the CRI or of ctr, on a machine that is overloaded
// on purpose.
const callLimit = 90 * time.Second

// Options say what is to be lived.
type Options struct {
	// Lab is the containerd; its CRI is on in any case.
	Lab lab.Options
	// Handler is the CRI's runtime handler.
	Handler string
	// Pods is how many live at once, each third one by ctr.
	Pods int
	// For is how long new pods begin.
	For time.Duration
	// Seed of what is done.
	Seed uint64
	// Busy is how many endless loops run beside.
	Busy int
	// Kill has every third pod lose its VMM, its virtio-fs daemon or its shim.
	Kill bool
	// Say gets a line for each pod.
	Say func(format string, args ...any)
}

// Report is what was seen.
type Report struct {
	// Pods and Calls that were made.
	Pods, Calls int
	// Faults are what must not be: the run ends with the first hang.
	Faults []string
	// Errors are the texts of calls that had a reason to fail, with their numbers.
	Errors map[string]int
	// Slowest is the longest that each kind of call took.
	Slowest map[string]time.Duration
}

// String is the report for people.
func (r *Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d pods, %d calls, %d faults\n", r.Pods, r.Calls, len(r.Faults))
	for _, name := range slices.Sorted(maps.Keys(r.Slowest)) {
		fmt.Fprintf(&b, "  slowest %-18s %v\n", name, r.Slowest[name].Round(time.Millisecond))
	}
	for _, text := range slices.Sorted(maps.Keys(r.Errors)) {
		fmt.Fprintf(&b, "  error, %d times: %s\n", r.Errors[text], text)
	}
	for _, f := range r.Faults {
		fmt.Fprintf(&b, "FAULT %s\n", f)
	}
	return b.String()
}

// soak is one run.
type soak struct {
	o    Options
	c    *lab.Containerd
	cri  internalapi.RuntimeService
	dir  string // what pods share with the host, with a mount below it
	hang context.CancelFunc

	mu     sync.Mutex
	report Report // guarded by mu
}

// Run lives pods until o.For is over, ctx ends, or a call hangs. The error is about
// the set-up; what the pods did is in the report.
func Run(ctx context.Context, o Options) (_ *Report, err error) {
	before, err := leak.Take()
	if err != nil {
		return nil, err
	}
	s := &soak{o: o, report: Report{Errors: map[string]int{}, Slowest: map[string]time.Duration{}}}
	if err := s.setUp(ctx); err != nil {
		return nil, errors.Join(err, s.tearDown())
	}
	s.live(ctx)
	err = s.tearDown()
	left, lerr := leak.Scope{}.Settle(before, leak.SettleTime)
	if len(left) > 0 {
		s.fault("left behind: %s", leak.Format(left))
	}
	return &s.report, errors.Join(err, lerr)
}

func (s *soak) setUp(ctx context.Context) (err error) {
	if s.dir, err = os.MkdirTemp("", "kata-soak-"); err != nil {
		return err
	}
	below := filepath.Join(s.dir, "below")
	err = errors.Join(
		unix.Mount(s.dir, s.dir, "", unix.MS_BIND, ""), unix.Mount("", s.dir, "", unix.MS_SHARED, ""),
		os.Mkdir(below, 0o755), unix.Mount("tmpfs", below, "tmpfs", 0, "size=16m"))
	if err != nil {
		return err
	}
	for i := range 20 {
		if err := os.WriteFile(filepath.Join(below, fmt.Sprint(i)), make([]byte, 200<<10), 0o644); err != nil {
			return err
		}
	}
	s.o.Lab.CRI = true
	if s.c, err = lab.Start(ctx, s.o.Lab); err != nil {
		return err
	}
	if err := s.c.ImportCRI(ctx); err != nil {
		return err
	}
	s.cri, err = criclient.NewRemoteRuntimeServiceBuilder().
		WithEndpoint(s.c.Endpoint()).WithConnectionTimeout(callLimit).WithTracerProvider(nil).Build(ctx)
	return err
}

func (s *soak) tearDown() error {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	var errs []error
	if s.cri != nil {
		errs = append(errs, s.cri.Close(ctx))
	}
	if s.c != nil {
		errs = append(errs, s.c.Stop(ctx))
	}
	if s.dir != "" {
		if err := unix.Unmount(s.dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, err)
		}
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}

// live runs the workers beside the busy loops.
func (s *soak) live(ctx context.Context) {
	ctx, s.hang = context.WithCancel(ctx)
	defer s.hang()
	for range s.o.Busy {
		loop := exec.Command("sh", "-c", "while :; do :; done")
		loop.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
		if err := loop.Start(); err != nil {
			s.fault("busy loop: %v", err)
			continue
		}
		defer func() {
			_ = loop.Process.Kill()
			_ = loop.Wait()
		}()
	}
	end := time.Now().Add(s.o.For)
	var workers sync.WaitGroup
	for n := range s.o.Pods {
		workers.Go(func() {
			for i := 0; ctx.Err() == nil && time.Now().Before(end); i++ {
				name := fmt.Sprintf("soak-%d-%d", n, i)
				p := &life{soak: s, name: name, r: rand.New(rand.NewPCG(s.o.Seed, uint64(n)<<32|uint64(i)))}
				began := time.Now()
				if n%3 == 2 {
					p.byCtr(ctx)
				} else {
					p.byCRI(ctx)
				}
				s.mu.Lock()
				s.report.Pods++
				s.mu.Unlock()
				s.o.Say("%s %s %v", name, p.story(), time.Since(began).Round(time.Millisecond))
			}
		})
	}
	workers.Wait()
}

// fault notes what must not be.
func (s *soak) fault(format string, args ...any) {
	text := time.Now().UTC().Format("15:04:05.000 ") + fmt.Sprintf(format, args...)
	s.mu.Lock()
	s.report.Faults = append(s.report.Faults, text)
	s.mu.Unlock()
	s.o.Say("FAULT %s", text)
}

// varying are parts of an error's text that differ each time.
var varying = regexp.MustCompile(`[0-9a-f]{16,}|soak-[0-9]+-[0-9]+|[0-9]+`)

// excused notes an error that had its reason.
func (s *soak) excused(what string, err error) {
	text := what + ": " + varying.ReplaceAllString(err.Error(), "#")
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report.Errors[text[:min(len(text), 700)]]++
}

// errHung is a call that did not return in time.
var errHung = errors.New("the call has not returned")

// call makes one call, which must return within callLimit.
func (s *soak) call(what, kind string, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	began, done := time.Now(), make(chan error, 1)
	go func() { done <- f(ctx) }()
	grace := time.NewTimer(callLimit + 10*time.Second)
	defer grace.Stop()
	var err error
	select {
	case err = <-done:
	case <-grace.C:
		err = errHung
	}
	took := time.Since(began)
	s.mu.Lock()
	s.report.Calls++
	s.report.Slowest[kind] = max(s.report.Slowest[kind], took)
	s.mu.Unlock()
	if took >= callLimit {
		s.fault("%s: %s hung for %v: %v", what, kind, took, err)
		s.hang()
		return errors.Join(errHung, err)
	}
	return err
}
