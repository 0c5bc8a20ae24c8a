# A NixOS module: the daemon, containerd that uses it, and Kubernetes that takes images from it.
#
#   imports = [ ./nixos-module.nix ];
#   services.fusesnap = {
#     enable = true;
#     package = fusesnap;                     # a package with bin/fusesnap
#     settings.substituters = [ "https://cache.example.org" ];
#     settings.trusted-public-keys = [ "cache.example.org-1:…=" ];
#     containerd.enable = true;
#     kubelet.enable = true;                  # or k3s.enable
#   };
{ config, lib, pkgs, ... }:

let
  cfg = config.services.fusesnap;
  root = cfg.settings.root or "/var/lib/fusesnap";
  socket = cfg.settings.address or "${root}/fusesnap.sock";
  configuration = (pkgs.formats.toml { }).generate "fusesnap.toml" cfg.settings;
  program = "${cfg.package}/bin/fusesnap";
in
{
  options.services.fusesnap = {
    enable = lib.mkEnableOption "fusesnap, a snapshotter for container images made of Nix packages";

    package = lib.mkOption {
      type = lib.types.package;
      description = "The package that has bin/fusesnap.";
    };

    settings = lib.mkOption {
      type = lib.types.attrsOf lib.types.anything;
      default = { };
      description = "The configuration, with the keys of fusesnap's README.";
    };

    containerd.enable = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = "Have virtualisation.containerd use it, for Kubernetes' pods too.";
    };

    kubelet.enable = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = "Have services.kubernetes.kubelet take images from it.";
    };

    k3s.enable = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = "Have services.k3s take images from it; its containerd is to be told of it, see ../k3s.";
    };
  };

  config = lib.mkIf cfg.enable (lib.mkMerge [
    {
      environment.systemPackages = [ cfg.package ];
      boot.kernelModules = [ "fuse" "overlay" ];

      # The same as ../systemd/fusesnap.service, where each line has its reason.
      systemd.services.fusesnap = {
        description = "fusesnap, a snapshotter for container images made of Nix packages";
        after = [ "network-online.target" "local-fs.target" ];
        wants = [ "network-online.target" ];
        before = [ "containerd.service" ];
        wantedBy = [ "multi-user.target" ];
        path = [ pkgs.fuse3 ];
        # A new configuration, or a new program, takes over without a reader noticing.
        reloadIfChanged = true;
        serviceConfig = {
          Type = "notify";
          NotifyAccess = "main";
          ExecStart = "${program} daemon --config ${configuration}";
          ExecReload = "${program} daemon reload --root ${root}";
          Restart = "always";
          RestartSec = "100ms";
          TimeoutStartSec = 90;
          TimeoutStopSec = 30;
          WatchdogSec = 30;
          FileDescriptorStoreMax = 8;
          Environment = [ "FDSTORE=8" ];
          KillMode = "mixed";
          StateDirectory = "fusesnap";
          LimitNOFILE = 1048576;
          TasksMax = "infinity";
          OOMScoreAdjust = -900;
          Nice = -10;
          CapabilityBoundingSet = [
            "CAP_SYS_ADMIN"
            "CAP_DAC_OVERRIDE"
            "CAP_DAC_READ_SEARCH"
            "CAP_CHOWN"
            "CAP_FOWNER"
            "CAP_FSETID"
            "CAP_MKNOD"
            "CAP_SETFCAP"
            "CAP_SYS_PTRACE"
          ];
          NoNewPrivileges = true;
          DevicePolicy = "closed";
          DeviceAllow = [ "/dev/fuse rw" ];
          RestrictAddressFamilies = [ "AF_UNIX" "AF_INET" "AF_INET6" "AF_NETLINK" ];
          RestrictNamespaces = true;
          RestrictRealtime = true;
          LockPersonality = true;
          SystemCallArchitectures = "native";
          SystemCallFilter = [ "@system-service" "@mount" ];
          SystemCallErrorNumber = "EPERM";
          KeyringMode = "private";
        };
      };
    }

    (lib.mkIf cfg.containerd.enable {
      virtualisation.containerd = {
        enable = true;
        settings = {
          version = 2;
          proxy_plugins.fusesnap = {
            type = "snapshot";
            address = socket;
            exports.root = root;
          };
          plugins."io.containerd.grpc.v1.cri".containerd = {
            snapshotter = "fusesnap";
            disable_snapshot_annotations = false;
          };
          plugins."io.containerd.transfer.v1.local".unpack_config = map
            (snapshotter: {
              platform = "linux";
              inherit snapshotter;
              differ = "walking";
            })
            [ "overlayfs" "fusesnap" ];
        };
      };
    })

    (lib.mkIf cfg.kubelet.enable {
      services.kubernetes.kubelet.extraOpts = "--image-service-endpoint=unix://${socket}";
    })

    (lib.mkIf cfg.k3s.enable {
      services.k3s.extraFlags = [
        "--snapshotter=fusesnap"
        "--image-service-endpoint=unix://${socket}"
      ];
    })
  ]);
}
