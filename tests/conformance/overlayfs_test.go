package conformance

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
)

const (
	// The daemon's state directory.
	state = "FUSESNAP_STATE"
	calls = 2000
	seed  = 5

	notFound           = "not found"
	alreadyExists      = "already exists"
	failedPrecondition = "failed precondition"
	invalidArgument    = "invalid argument"
)

// How often each call is made, of the sum.
var weights = map[string]int{
	"Prepare": 7, "View": 3, "Commit": 7, "Remove": 5, "Stat": 2, "Update": 4, "Usage": 3, "Mounts": 4, "Walk": 2,
	"Cleanup": 1,
}

// How each call may end. All of it must come up, or the calls are too few.
var possible = map[string][]string{
	"Prepare": {"", notFound, alreadyExists, invalidArgument},
	"View":    {"", notFound, alreadyExists, invalidArgument},
	"Commit":  {"", notFound, alreadyExists, failedPrecondition, invalidArgument},
	"Remove":  {"", notFound, failedPrecondition},
	"Stat":    {"", notFound},
	"Update":  {"", notFound, invalidArgument},
	"Usage":   {"", notFound},
	"Mounts":  {"", notFound, failedPrecondition},
	"Walk":    {"", invalidArgument},
	"Cleanup": {""},
}

// TestSameAsOverlayfs makes the same calls on containerd's own overlayfs snapshotter and on ours, by chance but always
// the same. All that they answer must be equal: mounts to the letter, infos, usage, and the kinds of errors.
func TestSameAsOverlayfs(t *testing.T) {
	ctx := context.Background()
	root := t.TempDir()
	theirs, err := overlay.NewSnapshotter(root)
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	ours, done, err := connect(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	chance := rand.New(rand.NewPCG(seed, seed))
	outcomes := map[string]int{}
	for number := range calls {
		call := randomCall(chance, number)
		expected, got := call.on(ctx, theirs, root), call.on(ctx, ours, os.Getenv(state))
		if !reflect.DeepEqual(expected, got) {
			t.Fatalf("call %d, %v\noverlayfs: %+v\nfusesnap:  %+v", number, call, expected, got)
		}
		outcomes[call.name+" "+expected.Error]++
	}
	t.Log(outcomes)
	for name, kinds := range possible {
		for _, kind := range kinds {
			if outcomes[name+" "+kind] == 0 {
				t.Errorf("no %s ended with %q", name, kind)
			}
		}
	}
}

// call is one call with its arguments.
type call struct {
	name, key, target, parent string
	labels                    map[string]string
	words                     []string
	number                    int
}

// outcome is what a snapshotter answered, without what differs between any two: the root, and times.
type outcome struct {
	Error  string
	Mounts []mount.Mount
	Infos  []info
	Usage  snapshots.Usage
}

type info struct {
	Kind         snapshots.Kind
	Name, Parent string
	Labels       map[string]string
	IsUpdated    bool
}

func randomCall(chance *rand.Rand, number int) call {
	// The first call finds an empty store: overlayfs has no bucket before it, and knows less of errors.
	if number == 0 {
		return call{name: "Prepare", key: "k0"}
	}
	key := func() string { return fmt.Sprintf("k%d", chance.IntN(10)) }
	made := call{key: key(), target: key(), parent: pick(chance, "", key(), key()), number: number}
	made.labels = map[string]string{
		"containerd.io/snapshot.ref": pick(chance, "", "sha256:1", "sha256:2"),
		"other/label":                pick(chance, "", "x"),
	}
	if chance.IntN(4) == 0 {
		made.labels = nil
	}
	made.name = pick(chance, names()...)
	switch made.name {
	case "Commit":
		made.parent = pick(chance, "", "", key())
		if made.parent == made.target {
			made.parent = "" // overlayfs would make it its own parent
		}
	case "Update":
		made.words = pick(chance, nil, []string{"labels"}, []string{"labels.other/label"},
			[]string{"labels.containerd.io/snapshot.ref", "labels.none"}, []string{"created"}, []string{"parent"},
			[]string{"labels.other/label", "kind"}, []string{"nonsense"})
	case "Walk":
		made.words = pick(chance, nil, []string{"kind==active"}, []string{"kind!=view"}, []string{"parent==k1", "name==k2"},
			[]string{`labels."containerd.io/snapshot.ref"==sha256:1,parent==""`}, []string{"labels.other/label"},
			[]string{"labels.nothing!=x,name~=/[0-4]$/"}, []string{"name=k1"})
	}
	return made
}

// names has the name of each call as often as it has weight.
func names() []string {
	made := []string{}
	for name, weight := range weights {
		made = append(made, slices.Repeat([]string{name}, weight)...)
	}
	slices.Sort(made)
	return made
}

func pick[T any](chance *rand.Rand, choices ...T) T {
	return choices[chance.IntN(len(choices))]
}

// on makes the call on a snapshotter that keeps its files below root.
func (c call) on(ctx context.Context, sn snapshots.Snapshotter, root string) outcome {
	var (
		mounts []mount.Mount
		infos  []snapshots.Info
		usage  snapshots.Usage
		err    error
	)
	add := func(_ context.Context, found snapshots.Info) error {
		infos = append(infos, found)
		return nil
	}
	labels := snapshots.WithLabels(copied(c.labels))
	switch c.name {
	case "Prepare":
		mounts, err = sn.Prepare(ctx, c.key, c.parent, labels)
		if err == nil {
			err = write(mounts, c.number)
		}
	case "View":
		mounts, err = sn.View(ctx, c.key, c.parent, labels)
	case "Commit":
		err = sn.Commit(ctx, c.target, c.key, labels, snapshots.WithParent(c.parent))
	case "Remove":
		err = sn.Remove(ctx, c.key)
	case "Stat":
		var found snapshots.Info
		if found, err = sn.Stat(ctx, c.key); err == nil {
			infos = append(infos, found)
		}
	case "Update":
		var found snapshots.Info
		given := snapshots.Info{Name: c.key, Parent: c.parent, Kind: snapshots.KindView, Labels: copied(c.labels)}
		if found, err = sn.Update(ctx, given, c.words...); err == nil {
			infos = append(infos, found)
		}
	case "Usage":
		usage, err = sn.Usage(ctx, c.key)
	case "Mounts":
		mounts, err = sn.Mounts(ctx, c.key)
	case "Walk":
		err = sn.Walk(ctx, add, c.words...)
	case "Cleanup":
		err = sn.(snapshots.Cleaner).Cleanup(ctx)
	}
	return outcome{kindOf(err), relative(mounts, root), plain(infos), usage}
}

func copied(labels map[string]string) map[string]string {
	made := map[string]string{}
	maps.Copy(made, labels)
	return made
}

// write puts into an active snapshot's own directory what its usage and its chain can be told by.
func write(mounts []mount.Mount, number int) error {
	directory := mounts[0].Source
	for _, option := range mounts[0].Options {
		if upper, found := strings.CutPrefix(option, "upperdir="); found {
			directory = upper
		}
	}
	below := filepath.Join(directory, fmt.Sprint(number%7))
	if err := os.Mkdir(below, 0o755); err != nil {
		return err
	}
	file := filepath.Join(below, "file")
	if err := os.WriteFile(file, make([]byte, number%300*100), 0o644); err != nil {
		return err
	}
	return os.Link(file, filepath.Join(below, "link"))
}

func relative(mounts []mount.Mount, root string) []mount.Mount {
	made := []mount.Mount{}
	for _, one := range mounts {
		one.Source = strings.ReplaceAll(one.Source, root, "")
		options := []string{}
		for _, option := range one.Options {
			options = append(options, strings.ReplaceAll(option, root, ""))
		}
		one.Options = options
		made = append(made, one)
	}
	return made
}

// plain sorts infos, and says of times whether the last change came after the first. A label without a value is none:
// overlayfs answers Update with what it was given, and stores it without.
func plain(infos []snapshots.Info) []info {
	made := []info{}
	for _, one := range infos {
		labels := copied(one.Labels)
		maps.DeleteFunc(labels, func(_, value string) bool { return value == "" })
		made = append(made, info{one.Kind, one.Name, one.Parent, labels, one.Updated.After(one.Created)})
	}
	slices.SortFunc(made, func(one, other info) int { return strings.Compare(one.Name, other.Name) })
	return made
}

func kindOf(err error) string {
	switch {
	case err == nil:
		return ""
	case errdefs.IsNotFound(err):
		return notFound
	case errdefs.IsAlreadyExists(err):
		return alreadyExists
	case errdefs.IsFailedPrecondition(err):
		return failedPrecondition
	case errdefs.IsInvalidArgument(err):
		return invalidArgument
	}
	return "another error: " + err.Error()
}
