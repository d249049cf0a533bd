{{/* A tag that is a digest stands behind an @. */}}
{{- define "conserve.image" -}}
{{- $tag := .Values.image.tag | default .Chart.AppVersion -}}
{{ .Values.image.repository }}{{ hasPrefix "sha256:" $tag | ternary "@" ":" }}{{ $tag }}
{{- end }}

{{- define "conserve.args" -}}
{{- $s := .Values.server -}}
{{- with $s.model }}
- {{ . | quote }}
{{- end }}
- --port=8000
- --slo-ttft-ms={{ $s.sloTtftMs }}
- --slo-tbt-ms={{ $s.sloTbtMs }}
- --chat-slowdown={{ $s.chatSlowdown }}
- --offline-floor={{ $s.offlineFloor }}
- --api-server-count={{ int64 $s.apiServerCount }}
- --shutdown-timeout={{ int64 .Values.shutdown.requestsSeconds }}
{{- if not .Values.batches.enabled }}
- --no-batches
{{- end }}
{{- range $s.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{/* A variable out of a Secret, of (its name, the Secret). */}}
{{- define "conserve.secret" -}}
{{- $secret := index . 1 -}}
{{- if $secret.name }}
- name: {{ index . 0 }}
  valueFrom:
    secretKeyRef:
      name: {{ $secret.name | quote }}
      key: {{ $secret.key | quote }}
{{- end }}
{{- end }}

{{- define "conserve.environment" -}}
# Caches lie below the home folder: models, kernels, latency models. No account has this number, so
# that its name is given, too.
- name: HOME
  value: /cache
- name: USER
  value: conserve
{{- include "conserve.secret" (list "VLLM_API_KEY" .Values.secrets.apiKey) }}
{{- include "conserve.secret" (list "HF_TOKEN" .Values.secrets.huggingFace) }}
{{- if .Values.batches.enabled }}
- name: CONSERVE_BATCH_DATA_DIR
  value: /data
{{- include "conserve.secret" (list "CONSERVE_BATCH_DATABASE_URL" .Values.secrets.database) }}
{{- with include "conserve.filesUrl" . }}
- name: CONSERVE_BATCH_FILES_URL
  value: {{ . | quote }}
{{- end }}
{{- end }}
{{- with .Values.server.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Empty where files lie in the data folder. */}}
{{- define "conserve.filesUrl" -}}
{{- if .Values.storage.filesUrl -}}
{{ .Values.storage.filesUrl }}
{{- else if eq (include "conserve.claimedAt" .) "/files" -}}
file:///files
{{- end -}}
{{- end }}

{{/* Where the claim for files and batches is mounted: it holds the files where a database holds the
rest, else all. Folders of workers are then each pod's own. Empty where there is none. */}}
{{- define "conserve.claimedAt" -}}
{{- if and .Values.batches.enabled .Values.storage.claim.enabled -}}
{{- if not .Values.secrets.database.name -}}/data{{- else if not .Values.storage.filesUrl -}}/files{{- end -}}
{{- end -}}
{{- end }}

{{- define "conserve.mounts" -}}
- name: tmp
  mountPath: /tmp
- name: shared-memory
  mountPath: /dev/shm
- name: cache
  mountPath: /cache
{{- if .Values.batches.enabled }}
{{- if ne (include "conserve.claimedAt" .) "/data" }}
- name: data
  mountPath: /data
{{- end }}
{{- with include "conserve.claimedAt" . }}
- name: storage
  mountPath: {{ . }}
{{- end }}
{{- end }}
{{- with .Values.pod.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "conserve.volumes" -}}
- name: tmp
  emptyDir: {}
- name: shared-memory
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.sharedMemory }}
- name: cache
  {{- if .Values.modelCache.claim.enabled }}
  persistentVolumeClaim:
    claimName: {{ include "conserve.claim" (list . .Values.modelCache.claim "models") | quote }}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- if .Values.batches.enabled }}
{{- if ne (include "conserve.claimedAt" .) "/data" }}
- name: data
  emptyDir: {}
{{- end }}
{{- if include "conserve.claimedAt" . }}
- name: storage
  persistentVolumeClaim:
    claimName: {{ include "conserve.claim" (list . .Values.storage.claim "storage") | quote }}
{{- end }}
{{- end }}
{{- with .Values.pod.volumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "conserve.resources" -}}
{{- $all := deepCopy .Values.resources -}}
{{- if .Values.gpus -}}
{{- $_ := set $all "limits" (merge (dict .Values.gpuResource .Values.gpus) ($all.limits | default dict)) -}}
{{- end -}}
{{ toYaml $all }}
{{- end }}
