// SPDX-License-Identifier: Apache-2.0

package rpc

import (
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/kata-v2/kata/guest-agent/fault"
	"github.com/kata-v2/kata/protocols/agentpb"
)

func sum(data string) []byte { s := sha256.Sum256([]byte(data)); return s[:] }

// What a container writes is told once, whenever it was written; what the host
// has sent is not; the end of the volume ends the wait.
func TestWritten(t *testing.T) {
	s := &Service{SyncedDir: t.TempDir() + "/synced"}
	put := func(data string) {
		t.Helper()
		f := fileOf("file", data)
		f.InPlace = true
		if err := syncTo(s, &agentpb.SyncFilesRequest{Volume: "v", Files: []*agentpb.SyncedFile{f}}); err != nil {
			t.Fatal(err)
		}
	}
	type answer struct {
		resp *agentpb.WrittenResponse
		err  error
	}
	ask := func(ctx context.Context, known []byte, wait bool) chan answer {
		ch := make(chan answer, 1)
		go func() {
			resp, err := s.Written(ctx, &agentpb.WrittenRequest{Volume: "v", Path: "file", Known: known, Wait: wait, Most: 100})
			ch <- answer{resp, err}
		}()
		return ch
	}
	ctx := context.Background()
	put("from the host")
	if a := <-ask(ctx, sum("from the host"), false); a.err != nil || a.resp.Changed {
		t.Errorf("nothing was written: %+v", a)
	}
	path := s.SyncedDir + "/v/file"
	for _, text := range []string{"one", "two", ""} { // before or after the call has begun to wait
		waiting := ask(ctx, sum("from the host"), true)
		if err := os.WriteFile(path, []byte(text), 0); err != nil {
			t.Fatal(err)
		}
		if a := <-waiting; a.err != nil || !a.resp.Changed || string(a.resp.Data) != text && string(a.resp.Data) != "" {
			t.Errorf("%q: %+v", text, a)
		}
		if a := <-ask(ctx, sum("from the host"), false); a.err != nil || string(a.resp.Data) != text {
			t.Errorf("%q: %+v", text, a)
		}
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("x", 101)), 0); err != nil {
		t.Fatal(err)
	}
	if a := <-ask(ctx, sum(""), false); a.err != nil || !a.resp.Changed || a.resp.Data != nil || a.resp.Size != 101 {
		t.Errorf("too large: %+v", a)
	}
	if a := <-ask(ctx, []byte("101"), false); a.err != nil || a.resp.Changed {
		t.Errorf("too large, and known: %+v", a)
	}
	put("again")
	gone, cancelled := ask(ctx, sum("again"), true), make(chan answer)
	cctx, cancel := context.WithCancel(ctx)
	go func() { cancelled <- <-ask(cctx, sum("again"), true) }()
	cancel()
	if a := <-cancelled; !errors.Is(a.err, context.Canceled) {
		t.Errorf("a caller that has gone: %+v", a)
	}
	if err := syncTo(s, &agentpb.SyncFilesRequest{Volume: "v", Removals: []string{"."}}); err != nil {
		t.Fatal(err)
	}
	if a := <-gone; fault.KindOf(a.err) != fault.NotFound || !errors.Is(a.err, errWatchOver) {
		t.Errorf("a volume that has gone: %+v", a)
	}
	for _, r := range []*agentpb.WrittenRequest{{Volume: "..", Path: "file"}, {Volume: "v/x", Path: "file"}, {Volume: "v", Path: "../x"}, {Volume: "v", Path: "/file"}} {
		if _, err := s.Written(ctx, r); fault.KindOf(err) != fault.InvalidArgument {
			t.Errorf("%v: %v", r, err)
		}
	}
	put("x")
	if err := os.Symlink("/etc/passwd", s.SyncedDir+"/v/link"); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"link", "."} {
		if resp, err := s.Written(ctx, &agentpb.WrittenRequest{Volume: "v", Path: p, Most: 1 << 20}); err == nil {
			t.Errorf("%s: %d bytes", p, len(resp.Data))
		}
	}
}
