# A Home Manager module: what an ordinary user has of fusesnap, without root and without a daemon. Closures are fetched
# ahead, and store paths and images are shown as directories that are fetched as they are read.
#
#   imports = [ ./home-manager-module.nix ];
#   services.fusesnap = {
#     enable = true;
#     package = fusesnap;                     # a package with bin/fusesnap
#     settings.substituters = [ "https://cache.example.org" ];
#     settings.trusted-public-keys = [ "cache.example.org-1:…=" ];
#     prefetch = [ "/nix/store/<hash>-hello-2.12" ];
#     mounts.tools = { source = "/nix/store/<hash>-tools"; mountpoint = "/home/me/tools"; };
#   };
{ config, lib, pkgs, ... }:

let
  cfg = config.services.fusesnap;
  configuration = (pkgs.formats.toml { }).generate "fusesnap.toml" cfg.settings;
  program = "${cfg.package}/bin/fusesnap";

  # No mount namespace of its own, or nobody else would see what it mounts; and fusermount3 is set-user-ID, so that new
  # privileges must not be refused.
  hardening = {
    LockPersonality = true;
    RestrictRealtime = true;
    SystemCallArchitectures = "native";
    RestrictAddressFamilies = [ "AF_UNIX" "AF_INET" "AF_INET6" "AF_NETLINK" ];
    UMask = "0077";
  };

  mountService = name: mount: {
    Unit = {
      Description = "fusesnap shows ${mount.source} at ${mount.mountpoint}";
      After = [ "network.target" ];
    };
    Service = hardening // {
      ExecStartPre = "${pkgs.coreutils}/bin/mkdir -p ${mount.mountpoint}";
      ExecStart = "${program} mount --config ${configuration} ${mount.source} ${mount.mountpoint}";
      ExecStopPost = "-${pkgs.fuse3}/bin/fusermount3 -u -q ${mount.mountpoint}";
      Environment = [ "PATH=/run/wrappers/bin:${pkgs.fuse3}/bin" ];
      Restart = "on-failure";
      RestartSec = 5;
    };
    Install.WantedBy = [ "default.target" ];
  };
in
{
  options.services.fusesnap = {
    enable = lib.mkEnableOption "fusesnap for one user";

    package = lib.mkOption {
      type = lib.types.package;
      description = "The package that has bin/fusesnap.";
    };

    settings = lib.mkOption {
      type = lib.types.attrsOf lib.types.anything;
      default = { };
      description = "The configuration, with the keys of fusesnap's README.";
    };

    prefetch = lib.mkOption {
      type = lib.types.listOf lib.types.str;
      default = [ ];
      description = "Store paths and images whose closures are fetched at login.";
    };

    mounts = lib.mkOption {
      type = lib.types.attrsOf (lib.types.submodule {
        options = {
          source = lib.mkOption {
            type = lib.types.str;
            description = "A store path, oci-archive:FILE or oci:DIR.";
          };
          mountpoint = lib.mkOption {
            type = lib.types.str;
            description = "An empty directory; it is made where there is none.";
          };
        };
      });
      default = { };
      description = "What is shown where, by a name for its unit.";
    };
  };

  config = lib.mkIf cfg.enable (lib.mkMerge [
    {
      home.packages = [ cfg.package ];
      systemd.user.services = lib.mapAttrs'
        (name: mount: lib.nameValuePair "fusesnap-${name}" (mountService name mount))
        cfg.mounts;
    }

    (lib.mkIf (cfg.prefetch != [ ]) {
      systemd.user.services.fusesnap-prefetch = {
        Unit = {
          Description = "fusesnap fetches closures before need";
          After = [ "network.target" ];
        };
        Service = hardening // {
          Type = "oneshot";
          NoNewPrivileges = true;
          ExecStart = "${program} prefetch --config ${configuration} ${toString cfg.prefetch}";
        };
        Install.WantedBy = [ "default.target" ];
      };
    })
  ]);
}
