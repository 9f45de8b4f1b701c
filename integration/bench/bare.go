// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/images"
	"github.com/kata-v2/kata/images/cpio"
	"github.com/kata-v2/kata/internal/spawn"
)

// bareMarker is the line that the bare machine's init writes.
const bareMarker = "bare-boot-done"

// bareTimeout bounds one bare boot, which takes seconds without KVM.
const bareTimeout = 60 * time.Second

// bareBoot measures the floor: from the start of QEMU to the first line of a
// tiny init, with the product's kernel, machine type, memory and parameters and
// no device beyond the serial port.
func (e *Env) bareBoot() Probe {
	boot, memory, remove := Row{BaseRow, Bare, Milliseconds}, Row{podPSS, Bare, Mebibytes}, Row{deleteRow, Bare, Milliseconds}
	return Probe{Rows: []Row{boot, remove, memory}, Take: func(ctx context.Context, add Add) error {
		took, err := bootBare(ctx, e.qemuPath, e.bareArgs, func(pid int) error {
			v, err := pss(pid)
			add(memory, v)
			return err
		})
		add(boot, milliseconds(took.boot))
		add(remove, milliseconds(took.end))
		return err
	}}
}

// bareTimes are the two ends of a bare machine: from the start of QEMU to init's
// line, and from its kill until it is gone.
type bareTimes struct{ boot, end time.Duration }

// bareArguments turns the command line of a pod's QEMU, without the program's
// name, into that of the bare machine. What decides the speed of the boot is
// taken over: machine type, accelerator, CPU model, memory – its memory file too, with which
// a boot is some 5 % faster than without –, firmware and the kernel's parameters but for the
// agent's. One CPU is all it gets.
func bareArguments(product []string, kernel, initrd string) ([]string, error) {
	keep := map[string]string{"-machine": "", "-accel": "", "-cpu": "", "-m": "", "-object": "", "-append": "", "-bios": ""}
	for i := 0; i+1 < len(product); i++ {
		// The first of several objects is the memory at boot; what comes later has its own.
		if have, wanted := keep[product[i]]; wanted && have == "" {
			keep[product[i]] = product[i+1]
		}
	}
	for _, needed := range []string{"-machine", "-accel", "-cpu", "-m", "-object", "-append"} {
		if keep[needed] == "" {
			return nil, fmt.Errorf("bench: the pod's QEMU runs without %s, which the bare machine takes over: %q", needed, product)
		}
	}
	drop := func(list, sep, prefix string) string {
		return strings.Join(slices.DeleteFunc(strings.Split(list, sep), func(s string) bool { return strings.HasPrefix(s, prefix) }), sep)
	}
	memory, _, _ := strings.Cut(keep["-m"], ",")
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "none", "-serial", "stdio",
		"-machine", keep["-machine"], "-object", keep["-object"], "-accel", keep["-accel"], "-cpu", keep["-cpu"],
		"-smp", "1", "-m", memory,
		"-kernel", kernel, "-initrd", initrd, "-append", drop(keep["-append"], " ", "agent."),
	}
	if keep["-bios"] != "" {
		args = append(args, "-bios", keep["-bios"])
	}
	return args, nil
}

// bootBare boots a bare machine and ends it; up, if given, is called while it runs.
func bootBare(ctx context.Context, qemu string, args []string, up func(pid int) error) (bareTimes, error) {
	ctx, cancel := context.WithTimeout(ctx, bareTimeout)
	defer cancel()
	thread := spawn.NewThread()
	defer thread.Close()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, qemu, args...)
	cmd.Stderr = &stderr
	// ^C is the bench's to handle.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return bareTimes{}, err
	}
	began := time.Now()
	if err := thread.Start(cmd); err != nil {
		return bareTimes{}, fmt.Errorf("start QEMU: %w", err)
	}
	console, err := readUntil(bufio.NewReader(out), bareMarker)
	took := bareTimes{boot: time.Since(began)}
	var upErr error
	if err == nil && up != nil {
		upErr = up(cmd.Process.Pid)
	}
	began = time.Now()
	kill := cmd.Process.Kill()
	if errors.Is(kill, os.ErrProcessDone) {
		kill = nil
	}
	_ = cmd.Wait() // it was killed, or the line below says why it ended
	took.end = time.Since(began)
	switch {
	case ctx.Err() != nil:
		return bareTimes{}, fmt.Errorf("bare machine: %w; console: %s", ctx.Err(), console)
	case err != nil:
		return bareTimes{}, fmt.Errorf("bare machine ended before its init wrote a line: %w; stderr: %s; console: %s", err, stderr.String(), console)
	}
	return took, errors.Join(upErr, kill)
}

// readUntil reads lines up to the one that holds marker and returns them all.
func readUntil(r *bufio.Reader, marker string) (string, error) {
	var all strings.Builder
	for {
		line, err := r.ReadString('\n')
		all.WriteString(line)
		if strings.Contains(line, marker) {
			return all.String(), nil
		}
		if err != nil {
			return all.String(), err
		}
	}
}

// prepareBare writes the bare machine's initramfs and its command line.
func (e *Env) prepareBare(product []string) (err error) {
	initrd := filepath.Join(e.dir, "bare.cpio")
	f, err := os.Create(initrd)
	if err != nil {
		return fmt.Errorf("bench: bare machine: %w", err)
	}
	err = cpio.Write(f, []cpio.Entry{
		cpio.CharDevice("dev/console", 0o600, 5, 1),
		cpio.File("init", 0o755, tinyInit(bareMarker+"\n")),
	})
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("bench: bare machine: %w", err)
	}
	e.qemuPath = product[0]
	e.bareArgs, err = bareArguments(product[1:], filepath.Join(e.o.Images, images.KernelFile), initrd)
	return err
}

// tinyInit is a static x86-64 program of one page that writes message to its
// standard output and sleeps: the least an init can do, and no compiler needed.
func tinyInit(message string) []byte {
	const (
		base   = 0x400000
		ehdr   = 64 // bytes, ELF-64 object file format
		phdr   = 56
		codeAt = ehdr + phdr
	)
	code := []byte{0xbf, 1, 0, 0, 0} // mov edi, 1
	code = append(code, 0xbe)        // mov esi, message
	messageAt := len(code)
	code = append(code, 0, 0, 0, 0)
	code = append(code, 0xba) // mov edx, length
	code = binary.LittleEndian.AppendUint32(code, uint32(len(message)))
	code = append(code, 0xb8, unix.SYS_WRITE, 0, 0, 0, 0x0f, 0x05) // mov eax, …; syscall
	code = append(code, 0xb8, unix.SYS_PAUSE, 0, 0, 0, 0x0f, 0x05) // mov eax, …; syscall
	code = append(code, 0xeb, 0xf7)                                // jmp to the mov above
	binary.LittleEndian.PutUint32(code[messageAt:], uint32(base+codeAt+len(code)))
	size := uint64(codeAt + len(code) + len(message))

	le := binary.LittleEndian
	b := append([]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, make([]byte, 9)...) // 64 bit, little endian, version 1
	b = le.AppendUint16(b, 2)                                             // executable
	b = le.AppendUint16(b, 62)                                            // x86-64
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, base+codeAt) // entry
	b = le.AppendUint64(b, ehdr)        // program headers
	b = le.AppendUint64(b, 0)           // no sections
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{ehdr, phdr, 1, 64, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	b = le.AppendUint32(b, 1) // load
	b = le.AppendUint32(b, 5) // read, execute
	for _, v := range []uint64{0, base, base, size, size, 0x1000} {
		b = le.AppendUint64(b, v)
	}
	return append(append(b, code...), message...)
}
