// Package conformance runs containerd's own suite for snapshotters, unmodified, against a running fusesnap.
package conformance

import (
	"context"
	"errors"
	"os"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// The suite expects less of some snapshotters, which it knows by their names; of overlayfs it expects everything.
const name = "overlayfs"

// The path of the unix socket where the snapshotter listens.
const address = "FUSESNAP_ADDRESS"

func TestSnapshotter(t *testing.T) {
	testsuite.SnapshotterSuite(t, name, connect)
}

// connect gives the client that containerd has of a proxy plugin. The daemon has a root of its own already.
func connect(context.Context, string) (snapshots.Snapshotter, func() error, error) {
	path := os.Getenv(address)
	if path == "" {
		return nil, nil, errors.New(address + " is not set")
	}
	connection, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	client := snapshotsapi.NewSnapshotsClient(connection)
	return proxy.NewSnapshotter(client, "fusesnap"), connection.Close, nil
}
